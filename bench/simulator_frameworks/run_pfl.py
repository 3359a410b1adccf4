"""pfl-research's federated averaging in one process."""

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm import FederatedAveraging, NNAlgorithmParams
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Weighted
from pfl.model.pytorch import PyTorchModel
from torch import nn
from torch.nn import functional
from work import BATCH, LEARNING_RATE, NUM_PEERS, NUM_ROUNDS, SAMPLES, load_peer, make_model


class Perceptron(nn.Module):
    """The work's, with the two functions that pfl calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = make_model()

    def loss(self, inputs: torch.Tensor, targets: torch.Tensor, eval: bool = False) -> torch.Tensor:
        """Of a batch."""
        self.train(not eval)
        return functional.cross_entropy(self.layers(inputs), targets)

    @torch.no_grad()
    def metrics(self, inputs: torch.Tensor, targets: torch.Tensor, eval: bool = True) -> dict[str, Weighted]:
        """Of a batch, for evaluations: none is made in the rounds that are measured."""
        return {"loss": Weighted(self.loss(inputs, targets, eval).item() * len(targets), len(targets))}


torch.set_num_threads(1)
peers = [PyTorchTensorDataset(load_peer(number)) for number in range(NUM_PEERS)]
data = FederatedDataset(peers.__getitem__, get_user_sampler("minimize_reuse", list(range(NUM_PEERS))))
module = Perceptron()
FederatedAveraging().run(
    algorithm_params=NNAlgorithmParams(
        central_num_iterations=NUM_ROUNDS,
        evaluation_frequency=NUM_ROUNDS + 1,
        train_cohort_size=NUM_PEERS,
        val_cohort_size=0,
    ),
    backend=SimulatedBackend(training_data=data, val_data=data),
    model=PyTorchModel(
        module,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
    ),
    model_train_params=NNTrainHyperParams(
        local_num_epochs=1, local_learning_rate=LEARNING_RATE, local_batch_size=BATCH
    ),
    model_eval_params=NNEvalHyperParams(local_batch_size=SAMPLES),
)
