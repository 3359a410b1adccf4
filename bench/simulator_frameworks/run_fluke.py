"""fluke's FedAVG in one process."""

import torch
from fluke import DDict, FlukeENV
from fluke.algorithms.fedavg import FedAVG
from fluke.data import DataContainer, DataSplitter
from fluke.evaluation import ClassificationEval
from work import BATCH, LEARNING_RATE, NUM_PEERS, NUM_ROUNDS, SAMPLES, load_peer, make_model

torch.set_num_threads(1)
FlukeENV().set_seed(1)
FlukeENV().set_device("cpu")
FlukeENV().set_inmemory(True)
FlukeENV().set_evaluator(ClassificationEval(eval_every=NUM_ROUNDS + 1, n_classes=10))
FlukeENV().set_eval_cfg(pre_fit=False, post_fit=False, locals=False, server=False)
inputs, targets = (torch.cat(parts) for parts in zip(*(load_peer(number) for number in range(NUM_PEERS)), strict=True))
container = DataContainer(inputs, targets, inputs[:SAMPLES], targets[:SAMPLES], 10)
client = {
    "batch_size": BATCH,
    "local_epochs": 1,
    "loss": "CrossEntropyLoss",
    "optimizer": {"name": "SGD", "lr": LEARNING_RATE},
    "scheduler": {"name": "StepLR", "step_size": 1, "gamma": 1},
}
algorithm = FedAVG(
    NUM_PEERS,
    DataSplitter(container, distribution="iid"),
    DDict({"client": client, "server": {"weighted": True}, "model": make_model()}),
)
algorithm.run(NUM_ROUNDS, 1.0, finalize=False)
