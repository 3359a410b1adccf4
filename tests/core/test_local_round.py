"""One federated round in process, on a user's own peft model, with the guide's own code; on the tiny Llama fixture."""

import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoTokenizer

from p2pfm.config import CompressionConfig, TrainingConfig
from p2pfm.errors import ConfigError, OperatorError
from p2pfm.local_round import run_local_round
from p2pfm.lora.delta import encode_tensors
from p2pfm.lora.examples import encode_examples
from p2pfm.lora.layers import get_adapter_tensors, load_backbone, set_adapter_tensors
from p2pfm.lora.samples import Sample

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "fixtures" / "tiny-llama"
GUIDE = ROOT / "docs" / "guides" / "one-round-with-peft.md"
STEPS = TrainingConfig(steps=8, batch=2, tokens_max=48, learning_rate=5e-3)

FAR = TrainingConfig(steps=8, batch=2, tokens_max=48, learning_rate=2e-2)


def ask(**answers):
    return [
        {"prompt": f"What is a {thing}?", "completion": f"A {thing} {answer}."} for thing, answer in answers.items()
    ]


ALICE = ask(cat="is an animal that hunts mice", dog="is an animal that guards the house", cow="gives milk")
BOB = ask(computer="is a machine that follows a program", clock="shows the time", car="moves on four wheels")
HELD_OUT = ask(goat="is an animal that climbs rocks", pump="is a machine that moves water")
PEERS = {"alice": ALICE, "bob": BOB}
KINDS = {
    "lora": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.2),
    "several ranks": LoraConfig(
        r=2, target_modules="all-linear", rank_pattern={"v_proj": 5}, alpha_pattern={"v_proj": 9}
    ),
    "dora": LoraConfig(r=4, target_modules=["q_proj"], use_dora=True),
    "ia3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "prompt": PromptTuningConfig(num_virtual_tokens=4),
}


def make_noise(tokenizer, seed: int = 0):
    """Random tokens as answers: a peer that only harms."""
    draw = random.Random(seed)
    prompts = encode_examples(HELD_OUT, "held out", tokenizer, 48, 1024)
    ids = [[*part.tokens[: part.num_prompt], *draw.choices(range(300, 1024), k=20)] for part in prompts]
    return [{"input_ids": part, "labels": [-100] * (len(part) - 20) + part[-20:]} for part in ids]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


def make_model(kind: str = "lora", dtype=torch.float32):
    torch.manual_seed(3)
    config = KINDS[kind]
    config.task_type = "CAUSAL_LM"
    return get_peft_model(load_backbone(TINY, dtype)[0], config)


def read(model) -> bytes:
    return encode_tensors(get_adapter_tensors(model))


def test_the_guides_code_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    (user,) = [block for block in blocks if "result = run_local_round(model" in block and "get_peft_model" in block]
    assert len([line for line in user.splitlines() if line.strip()]) <= 10
    names = {"backbone": str(TINY)}
    losses = []
    for block in blocks:
        exec(compile(block, str(GUIDE), "exec"), names)
        if "result" in names:
            losses.append((names["result"].loss_before, names["result"].loss_after))
    first = losses[0]
    assert first[1] < first[0]
    assert losses[-1][1] < first[1]
    again = PeftModel.from_pretrained(load_backbone(TINY, torch.float32)[0], tmp_path / "again")
    assert read(again) == read(names["model"])


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_round_moves_any_peft_adapter_to_a_lower_loss(kind, tokenizer):
    model = make_model(kind)
    before = get_adapter_tensors(model)
    steps = TrainingConfig(steps=8, batch=2, tokens_max=48, learning_rate=2e-2 if kind in ("ia3", "prompt") else 5e-3)
    result = run_local_round(model, PEERS, HELD_OUT, tokenizer, training=steps)
    assert result.loss_after < result.loss_before
    assert list(result.contributions) == list(result.weights) == list(result.payload_bytes) == ["alice", "bob"]
    assert sum(result.contributions.values()) > 0
    assert sum(result.weights.values()) <= 1
    assert max(result.payload_bytes.values()) < result.dense_bytes / 8
    assert read(model) == encode_tensors(result.base)
    assert any((before[name] != part).any() for name, part in result.base.items())
    assert model.training, "it was given in training mode"


def test_equal_arguments_give_the_same_round(tokenizer):
    results = [run_local_round(make_model(), PEERS, HELD_OUT, tokenizer, training=STEPS) for _ in range(2)]
    assert results[0].contributions == results[1].contributions
    assert encode_tensors(results[0].base) == encode_tensors(results[1].base)


def test_two_peers_with_the_same_data_count_once(tokenizer):
    result = run_local_round(make_model(), {"alice": ALICE, "again": ALICE}, HELD_OUT, tokenizer, training=STEPS)
    assert result.contributions["again"] == 0 < result.contributions["alice"]


def test_the_cross_term_is_told_of_lora_only(tokenizer):
    # A moves from its second step on, once B is not 0: then the mean of the products is not that of the factors.
    lora, ia3 = (run_local_round(make_model(k), PEERS, HELD_OUT, tokenizer, training=STEPS) for k in ("lora", "ia3"))
    assert 0 < lora.cross_term < 0.5
    assert ia3.cross_term == 0


def test_a_bf16_backbone_on_its_own_terms(tokenizer):
    model = make_model(dtype=torch.bfloat16)
    result = run_local_round(model, PEERS, HELD_OUT, tokenizer, training=STEPS)
    assert result.loss_after < result.loss_before


def test_what_was_trained_before_is_the_base(tokenizer):
    model = make_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.01
    start = get_adapter_tensors(model)
    result = run_local_round(model, PEERS, HELD_OUT, tokenizer, training=STEPS)
    moved = [np.abs(result.base[name] - part).max() for name, part in start.items()]
    assert 0 < max(moved) < 0.1
    assert any((part == 0.01).any() for part in start.values())


def test_frozen_factors_of_a_users_model_stay(tokenizer):
    model = make_model()
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    start = get_adapter_tensors(model)
    result = run_local_round(model, PEERS, HELD_OUT, tokenizer, training=STEPS)
    assert result.loss_after < result.loss_before
    assert all((result.base[name] == part).all() for name, part in start.items() if name.endswith("lora_A"))


@pytest.fixture(scope="module")
def fitted(tokenizer):
    """A base that knows the held-out answers so well that random ones harm it, and could know them better."""
    steps = TrainingConfig(steps=20, batch=2, tokens_max=48, learning_rate=5e-3)
    dense = CompressionConfig(chunk=256, keep=256)
    return run_local_round(make_model(), {"x": HELD_OUT}, HELD_OUT, tokenizer, training=steps, compression=dense).base


def test_who_harms_weighs_nothing_and_leaves_the_residual_as_it_was(tokenizer, fitted):
    model = make_model()
    set_adapter_tensors(model, fitted)
    result = run_local_round(
        model, {"alice": HELD_OUT, "mallory": make_noise(tokenizer)}, HELD_OUT, tokenizer, training=FAR
    )
    assert result.contributions["mallory"] < 0 < result.contributions["alice"]
    assert result.weights == {"alice": 1.0, "mallory": 0.0}
    assert set(result.residuals) == {"alice"}
    assert result.loss_after < result.loss_before


def test_a_round_of_harm_only_leaves_the_model_as_it_was(tokenizer, fitted):
    model = make_model()
    set_adapter_tensors(model, fitted)
    before = read(model)
    result = run_local_round(model, {"mallory": make_noise(tokenizer)}, HELD_OUT, tokenizer, training=FAR)
    assert result.weights == {"mallory": 0.0}
    assert result.contributions["mallory"] < 0
    assert result.loss_after == result.loss_before
    assert read(model) == before


def test_rounds_carry_on_from_what_was_left_out(tokenizer):
    model = make_model()
    first = run_local_round(model, PEERS, HELD_OUT, tokenizer, training=STEPS)
    second = run_local_round(model, PEERS, HELD_OUT, tokenizer, training=STEPS, after=first)
    assert (first.round, second.round) == (0, 1)
    assert second.loss_before == pytest.approx(first.loss_after, abs=1e-6)
    assert set(second.residuals) == set(PEERS)
    assert second.loss_after < second.loss_before


def test_one_peer_with_one_sample_is_a_round(tokenizer):
    result = run_local_round(make_model(), {"alice": ALICE[:1]}, HELD_OUT[:1], tokenizer, training=STEPS)
    assert result.weights == {"alice": 1.0}
    assert result.loss_after < result.loss_before


def test_strata_weigh_the_same_however_long(tokenizer):
    short, long = HELD_OUT[:1], HELD_OUT[1:]
    losses = [
        run_local_round(make_model(), {"alice": ALICE[:1]}, strata, tokenizer, training=STEPS).loss_before
        for strata in ({"goat": short, "pump": long}, {"goat": short, "pump": long * 5})
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("peers", [{}, [], [ALICE], {"": ALICE}, {"a" * 129: ALICE}, {3: ALICE}])
def test_a_round_without_named_peers_is_refused(peers, tokenizer):
    with pytest.raises(OperatorError, match="peers"):
        run_local_round(make_model(), peers, HELD_OUT, tokenizer)


@pytest.mark.parametrize(
    ("peers", "held_out"), [({"alice": []}, HELD_OUT), (PEERS, []), (PEERS, {}), (PEERS, {"a": []})]
)
def test_empty_data_is_named(peers, held_out, tokenizer):
    with pytest.raises(OperatorError, match=r"alice|held"):
        run_local_round(make_model(), peers, held_out, tokenizer)


def test_a_model_that_cannot_take_part_is_refused(tokenizer, tmp_path):
    backbone, _ = load_backbone(TINY, torch.float32)
    with pytest.raises(OperatorError, match="get_peft_model"):
        run_local_round(backbone, PEERS, HELD_OUT, tokenizer)
    make_model().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load_backbone(TINY, torch.float32)[0], tmp_path)
    with pytest.raises(OperatorError, match="is_trainable=True"):
        run_local_round(loaded, PEERS, HELD_OUT, tokenizer)
    merged = make_model()
    merged.merge_adapter()
    with pytest.raises(OperatorError, match="unmerge_adapter"):
        run_local_round(merged, PEERS, HELD_OUT, tokenizer)
    thawed = make_model()
    thawed.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(OperatorError, match="embed_tokens"):
        run_local_round(thawed, PEERS, HELD_OUT, tokenizer)


def test_an_adapter_of_another_name_takes_part(tokenizer):
    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(load_backbone(TINY, torch.float32)[0], config, adapter_name="mine")
    model.add_adapter("other", config)
    other = encode_tensors(get_adapter_tensors(model, "other"))
    result = run_local_round(model, PEERS, HELD_OUT, tokenizer, training=STEPS)
    assert encode_tensors(get_adapter_tensors(model, "mine")) == encode_tensors(result.base)
    assert encode_tensors(get_adapter_tensors(model, "other")) == other


def test_a_failed_round_leaves_the_model_as_it_was(tokenizer):
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 1e25
    before = read(model)
    with pytest.raises(OperatorError, match="diverged"):
        run_local_round(model, PEERS, HELD_OUT, tokenizer, training=STEPS)
    assert read(model) == before
    assert model.training


def test_a_base_that_is_not_finite_is_refused(tokenizer):
    model = make_model()
    with torch.no_grad():
        next(parameter for parameter in model.parameters() if parameter.requires_grad).fill_(float("nan"))
    with pytest.raises(OperatorError, match=r"q_proj.*not finite"):
        run_local_round(model, PEERS, HELD_OUT, tokenizer, training=STEPS)


def test_a_round_of_another_model_is_not_carried_on(tokenizer):
    steps = TrainingConfig(steps=1, batch=1)
    other = run_local_round(make_model("ia3"), PEERS, HELD_OUT, tokenizer, training=steps)
    with pytest.raises(OperatorError, match=r"^after has.*ia3_l: is it of another"):
        run_local_round(make_model(), PEERS, HELD_OUT, tokenizer, training=steps, after=other)


def test_impossible_settings_are_named(tokenizer):
    with pytest.raises(ConfigError, match=r"training\.steps"):
        run_local_round(make_model(), PEERS, HELD_OUT, tokenizer, training=TrainingConfig(steps=0))
    with pytest.raises(ConfigError, match=r"compression\.keep"):
        run_local_round(make_model(), PEERS, HELD_OUT, tokenizer, compression=CompressionConfig(keep=0))


# --- what a dataset may be --------------------------------------------------------------------------------------------


def encode(examples, tokenizer=None, tokens_max=48):
    return encode_examples(examples, "mine", tokenizer, tokens_max, 1024)


def test_text_and_its_tokens_are_the_same_example(tokenizer):
    (text,) = encode(ALICE[:1], tokenizer)
    ids = list(text.tokens)
    labels = [-100] * text.num_prompt + ids[text.num_prompt :]
    padded = {"input_ids": [*ids, 0, 0], "labels": [*labels, -100, -100]}
    masked = {"input_ids": [0, 0, *ids], "labels": [-100, -100, *labels], "attention_mask": [0, 0, *[1] * len(ids)]}
    tensors = {key: torch.tensor(value) for key, value in masked.items()}
    for example in ({"input_ids": ids, "labels": labels}, padded, masked, tensors):
        assert encode([example]) == (text,)
    assert encode([Sample("any", ALICE[0]["prompt"], ALICE[0]["completion"])], tokenizer) == (text,)
    assert encode(iter(ALICE[:1]), tokenizer) == (text,)


def test_without_labels_everything_but_the_first_token_is_learned():
    (part,) = encode([{"input_ids": [5, 6, 7]}])
    assert (part.tokens, part.num_prompt) == ((5, 6, 7), 1)


def test_without_a_chat_template_prompt_and_completion_follow_one_another(tokenizer):
    plain = AutoTokenizer.from_pretrained(TINY)
    plain.chat_template = None
    (part,) = encode(ALICE[:1], plain)
    assert plain.decode(part.tokens[part.num_prompt :], skip_special_tokens=True).strip() == ALICE[0]["completion"]
    assert part.tokens[-1] == plain.eos_token_id
    assert part.tokens[: part.num_prompt] == tuple(plain(ALICE[0]["prompt"])["input_ids"])


def test_examples_without_room_for_what_is_learned_are_left_out(tokenizer):
    long = {"prompt": "word " * 200, "completion": "never seen"}
    assert len(encode([*ALICE, long], tokenizer)) == len(ALICE)
    assert len(encode([{"input_ids": list(range(60))}, {"input_ids": [1]}])) == 1
    with pytest.raises(OperatorError, match=r"mine: none of 1"):
        encode([long], tokenizer)


BAD = {
    "text without a tokenizer": (ALICE, "needs a tokenizer"),
    "one text": ("prompt", "expected a list"),
    "one mapping": (ALICE[0], "expected a list"),
    "a number": (3, "expected a list"),
    "no keys": ([{}], "input_ids"),
    "other keys": ([{"text": "hello"}], r"example 0: .*got keys \['text'\]"),
    "half text": ([*ALICE, {"prompt": "alone"}], "example 3"),
    "a conversation": ([{"prompt": [{"role": "user"}], "completion": "x"}], "example 0"),
    "an empty completion": ([{"prompt": "a", "completion": " "}], "example 0"),
    "a mixture": ([ALICE[0], {"input_ids": [1, 2]}], "example 1"),
    "a mixture, tokens first": ([{"input_ids": [1, 2]}, ALICE[0]], "example 1"),
    "nothing": ([], "got none"),
    "None": ([None], "NoneType"),
    "words as tokens": ([{"input_ids": ["a", "b"]}], "integers"),
    "fractions as tokens": ([{"input_ids": [1.0, 2.0]}], "integers"),
    "a batch as an example": ([{"input_ids": [[1, 2], [3, 4]]}], "integers"),
    "a ragged batch": ([{"input_ids": [[1, 2], [3]]}], "integers"),
    "lengths that differ": ([{"input_ids": [1, 2, 3], "labels": [1, 2]}], "3 input_ids, 2 labels"),
    "labels that differ": ([{"input_ids": [1, 2, 3], "labels": [-100, 3, 3]}], "labels other than"),
    "labels with gaps": ([{"input_ids": [1, 2, 3, 4], "labels": [-100, 2, -100, 4]}], "gaps"),
    "nothing labelled": ([{"input_ids": [1, 2], "labels": [-100, -100]}], "none of 1"),
    "no token at all": ([{"input_ids": []}], "none of 1"),
    "a token beyond the vocabulary": ([{"input_ids": [1, 1024]}], "1024"),
    "a negative token": ([{"input_ids": [-1, 5]}], "-1"),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_a_dataset_rejects(case, tokenizer):
    examples, message = BAD[case]
    with pytest.raises(OperatorError, match=message):
        encode(examples, None if case == "text without a tokenizer" else tokenizer)
