"""The commands `p2pfm stake` and `p2pfm pool`: what a member has locked and how it leaves, what sponsors paid in.

Knows a node's configuration and the Ledger; no round. What loads a chain's client is imported only when run.
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from p2pfm.config import WEI_PER_PFM
from p2pfm.errors import OperatorError, Reverted
from p2pfm.settlement.ledger import EPOCH_LAG_MAX, FederationParams, Ledger, Left, Member, Rotated, Slashed
from p2pfm.types import Wei

if TYPE_CHECKING:
    from p2pfm.runtime.web3_ledger import Web3Ledger

stake_app = typer.Typer(no_args_is_help=True, help="What a node has locked on chain, and how it leaves.")
pool_app = typer.Typer(no_args_is_help=True, help="What sponsors paid in for rewards.")

AMOUNT_MAX = 2**128 - 1
"""The contract's type of a pool [wei]."""

out = Console(markup=False)

ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="The node's TOML file.")]
PasswordFile = Annotated[Path | None, typer.Option(help="File with the keys' password.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


@stake_app.command("show")
def stake_show(config_file: ConfigFile, as_json: Json = False, password_file: PasswordFile = None) -> None:
    """Stake and state of this node's membership: active, leaving (and free when), slashed, or none.

    Example: `p2pfm stake show --config alice/node.toml`
    """
    ledger = _as_account(config_file, password_file)
    told = describe_stake(ledger, ledger.account)
    if as_json:
        out.print_json(data=told)
        return
    for name, value in told.items():
        out.print(f"{name:14} {value}", highlight=False, soft_wrap=True)


@stake_app.command("unbond")
def stake_unbond(config_file: ConfigFile, password_file: PasswordFile = None) -> None:
    """Begin to leave: the node takes part no more; its stake is free when nothing it signed can be contested.

    Example: `p2pfm stake unbond --config alice/node.toml`
    """
    ledger = _as_account(config_file, password_file)
    try:
        ledger.unbond()
    except Reverted as error:
        raise OperatorError(_explain(error)) from error
    told = describe_stake(ledger, ledger.account)
    out.print(f"leaving: {told['free']}. Then: p2pfm stake withdraw --config {config_file}", soft_wrap=True)


@stake_app.command("withdraw")
def stake_withdraw(config_file: ConfigFile, password_file: PasswordFile = None) -> None:
    """Take the stake of a node that has left.

    Example: `p2pfm stake withdraw --config alice/node.toml`
    """
    ledger = _as_account(config_file, password_file)
    try:
        amount = ledger.withdraw()
    except Reverted as error:
        text = _explain(error)
        if error.reason == "StillLiable":
            text = f"the stake is {describe_stake(ledger, ledger.account)['free']}"
        raise OperatorError(text) from error
    out.print(f"{amount / WEI_PER_PFM:.4f} PFM paid back to {ledger.account}", highlight=False)


@pool_app.command("show")
def pool_show(config_file: ConfigFile, as_json: Json = False) -> None:
    """What is left for rewards, and for how many paying rounds it lasts.

    Example: `p2pfm pool show --config alice/node.toml`
    """
    told = describe_pool(_read_only(config_file))
    if as_json:
        out.print_json(data=told)
        return
    for name, value in told.items():
        out.print(f"{name:18} {value}", highlight=False, soft_wrap=True)


@pool_app.command("fund")
def pool_fund(
    config_file: ConfigFile,
    amount: Annotated[float, typer.Argument(min=0, help="How much, in PFM, from this node's account.")],
    serving: Annotated[bool, typer.Option("--serving", help="Into the pool that pays for serving.")] = False,
    password_file: PasswordFile = None,
) -> None:
    """Pay reward tokens into a pool. Nobody can take them out again but by rewards.

    Example: `p2pfm pool fund 500 --config sponsor/node.toml`
    """
    if not 0 < amount * WEI_PER_PFM <= AMOUNT_MAX:
        raise OperatorError(f"amount: expected PFM above 0, at most {AMOUNT_MAX // WEI_PER_PFM}, got {amount:g}")
    ledger = _as_account(config_file, password_file)
    if serving and not ledger.get_params().serving_per_epoch:
        raise OperatorError("this network has no pool for serving (network.chain.serving_pool): nothing was sent")
    try:
        (ledger.fund_serving if serving else ledger.fund)(Wei(round(amount * WEI_PER_PFM)))
    except Reverted as error:
        held = ledger.get_balance(ledger.account) / WEI_PER_PFM
        raise OperatorError(f"account {ledger.account} holds {held:.4f} PFM ({error})") from error
    name, held = ("serving pool", ledger.get_serving_pool()) if serving else ("pool", ledger.get_pool())
    out.print(f"the {name} holds {held / WEI_PER_PFM:.4f} PFM", highlight=False)


def describe_stake(ledger: Ledger, account: str) -> dict[str, Any]:
    """An account's membership, for people and scripts. Raises: ChainError."""
    mine = [member for member in ledger.get_roster().members if member.account == account]
    if not mine:
        return {"account": account, "state": "not registered", "stake_pfm": 0.0, "free": "there is none"}
    member = mine[-1]
    happened = [entry.what for entry in ledger.get_entries()]
    is_slashed = any(isinstance(what, Slashed) and what.index == member.index for what in happened)
    has_left = any(isinstance(what, Left) and what.index == member.index for what in happened)
    if member.active:
        state, free = "active", "not leaving: p2pfm stake unbond"
    elif is_slashed:
        state, free = "slashed", "lost: this account's signature was proven false; join with a new home (p2pfm init)"
    elif has_left and member.stake:
        state, free = "leaving", _tell_when_free(ledger, member)
    else:
        state, free = "left", "paid back; p2pfm node run joins anew"
    return {
        "account": account,
        "member": member.index,
        "state": state,
        "stake_pfm": member.stake / WEI_PER_PFM,
        "free": free,
    }


def describe_pool(ledger: Ledger) -> dict[str, Any]:
    """Pool and what it lasts for. Raises: ChainError."""
    pool, params, head = ledger.get_pool(), ledger.get_params(), ledger.get_head()
    lasts = "for ever: a round pays nothing" if params.pool_per_epoch == 0 else f"{pool // params.pool_per_epoch}"
    return {
        "pool_pfm": pool / WEI_PER_PFM,
        "per_epoch_pfm": params.pool_per_epoch / WEI_PER_PFM,
        "paying_rounds_left": lasts,
        "allotted_pfm": head.sums.cumulative_wei / WEI_PER_PFM if head else 0.0,
        "rounds_per_epoch": params.rounds_per_epoch,
        "serving_pool_pfm": ledger.get_serving_pool() / WEI_PER_PFM,
        "serving_per_epoch_pfm": params.serving_per_epoch / WEI_PER_PFM,
    }


def _tell_when_free(ledger: Ledger, member: Member) -> str:
    """As the contract counts: the last committee it may be on, the lag of certificates, then the unbonding period."""
    params = ledger.get_params()
    entries = ledger.get_entries()
    left_at = next(
        number
        for number, entry in enumerate(entries)
        if isinstance(entry.what, Left) and entry.what.index == member.index
    )
    epoch_then = sum(isinstance(entry.what, Rotated) for entry in entries[:left_at])
    free_epoch = epoch_then + 1 + EPOCH_LAG_MAX + 1
    drawn = [entry.time_s for entry in entries if isinstance(entry.what, Rotated) and entry.what.epoch == free_epoch]
    if not drawn:
        return f"free {_tell_days(params)} after committee {free_epoch} is drawn (now {ledger.get_roster().epoch})"
    return f"free at {time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime(drawn[0] + params.unbonding_s))}"


def _tell_days(params: FederationParams) -> str:
    days = params.unbonding_s / 86_400
    return f"{days:.1f} days" if days >= 1 else f"{params.unbonding_s} s"


def _explain(error: Reverted) -> str:
    return {
        "UnknownMember": "this account is no member: nothing is staked",
        "NotActive": "this node is leaving already, or was slashed: p2pfm stake show",
        "NotLeaving": "this node has not left, or has no stake any more: p2pfm stake show",
    }.get(error.reason, str(error))


def _read_only(config_file: Path) -> "Web3Ledger":
    from nodes.homes import read_config
    from p2pfm.runtime.web3_ledger import READ_ONLY_KEY, open_ledger

    return open_ledger(read_config(config_file), READ_ONLY_KEY)


def _as_account(config_file: Path, password_file: Path | None) -> "Web3Ledger":
    from nodes.homes import open_keys, read_config
    from p2pfm.runtime.web3_ledger import open_ledger

    config = read_config(config_file)
    return open_ledger(config, open_keys(config, password_file).account_private_key)
