"""Flower's simulation on Ray, FedAvg."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from flwr.client import Client, ClientApp, NumPyClient
from flwr.common import Context, ndarrays_to_parameters
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.simulation import run_simulation
from numpy.typing import NDArray
from work import NUM_PEERS, NUM_ROUNDS, load_peer, make_model, train

torch.set_num_threads(1)


class Peer(NumPyClient):  # type: ignore[misc]
    """One of them."""

    def __init__(self, number: int) -> None:
        self.model, self.data = make_model(), load_peer(number)

    def fit(
        self, parameters: list[NDArray[np.float32]], config: Mapping[str, Any]
    ) -> tuple[list[NDArray[np.float32]], int, dict[str, Any]]:
        """One pass from the server's parameters."""
        names = list(self.model.state_dict())
        self.model.load_state_dict({name: torch.tensor(part) for name, part in zip(names, parameters, strict=True)})
        train(self.model, *self.data)
        return [part.numpy() for part in self.model.state_dict().values()], len(self.data[1]), {}


def make_client(context: Context) -> Client:
    """By the partition that the node has."""
    return Peer(int(context.node_config["partition-id"])).to_client()


def make_server(context: Context) -> ServerAppComponents:
    """All peers in every round, nobody evaluates."""
    start = ndarrays_to_parameters([part.numpy() for part in make_model().state_dict().values()])
    strategy = FedAvg(
        fraction_fit=1.0,
        fraction_evaluate=0.0,
        min_fit_clients=NUM_PEERS,
        min_available_clients=NUM_PEERS,
        initial_parameters=start,
    )
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=NUM_ROUNDS))


run_simulation(
    ServerApp(server_fn=make_server),
    ClientApp(client_fn=make_client),
    NUM_PEERS,
    backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": 2}},
)
