"""What a changed key means to a run that has begun: every key of the schema stands in one of the tables."""

from k2_megatron.config import load_config
from k2_megatron.config.changes import ACCEPTED, ENDED, HARMLESS, RECORDED, REFUSED, STORED_AS, changes, keys_given
from k2_megatron.config.load import KEYS

TOY = "examples/toy/toy.toml"


def test_every_key_has_one_class():
    tables = (HARMLESS, ACCEPTED, ENDED, REFUSED, RECORDED)
    assert sorted(KEYS) == sorted(key for table in tables for key in table)
    assert all(reason for table in tables for reason in table.values())
    assert len(STORED_AS) == 7


def test_weights_of_other_layers_are_stored_under_other_names():
    assert found(["model.implementation=transformer_engine"], set()) == {"model.implementation": "refused"}


def test_fingerprint_changes_with_what_is_not_harmless():
    """The two are one thing: a change that the fingerprint does not see is one that no start refuses."""
    base = load_config(TOY)
    for key, text in {"log.every_steps": "7", "model.rope_base": "5e5", "optimizer.beta1": "0.8"}.items():
        other = load_config(TOY, [f"{key}={text}"])
        assert (other.fingerprint == base.fingerprint) == (key in HARMLESS), key


def found(overrides: list[str], given: set[str]) -> dict[str, str]:
    now, was = load_config(TOY, overrides), load_config(TOY)
    dumped = [config.model_dump(exclude_none=True) for config in (now, was)]
    return {change.key: change.outcome for change in changes(*dumped, given)}


def test_set_accepts_what_may_be_changed_on_purpose_and_nothing_else():
    overrides = ["log.every_steps=7", "optimizer.beta1=0.8", "train.steps=999", "run.seed=3"]
    expected = {"log.every_steps": "harmless", "train.steps": "accepted", "run.seed": "refused"}
    expected["checkpoint.every_steps"] = "harmless"  # the toy has so many chunks: their length follows from the steps
    assert found(overrides, keys_given(overrides)) == {**expected, "optimizer.beta1": "accepted"}
    assert found(overrides, {"train.steps", "run.seed"}) == {**expected, "optimizer.beta1": "refused"}


def test_layout_is_the_same_to_the_bit_where_both_add_up_gradients_as_one_tree():
    more = ["parallel.tensor=1", "parallel.sequence=false", "parallel.data=2", "parallel.distributed_optimizer=true"]

    def reasons(leaves: str, leaves_before: str) -> dict[str, str]:
        now = load_config(TOY, [*more, f"train.gradient_leaves={leaves}"])
        was = load_config(TOY, [f"train.gradient_leaves={leaves_before}"])
        dumped = [config.model_dump(exclude_none=True) for config in (now, was)]
        return {change.key: change.reason for change in changes(*dumped, ())}

    found = reasons("4", "4")
    assert {key for key, reason in found.items() if "the same to the bit" in reason} == {
        "parallel.data",
        "parallel.distributed_optimizer",
    }
    assert {key for key, reason in found.items() if "rounding" in reason} == {"parallel.tensor", "parallel.sequence"}
    for leaves in (("4", "2"), ("4", ""), ("", "")):
        assert all("rounding" in reason for reason in reasons(*leaves).values()), leaves


def test_keys_given_count_their_table():
    assert keys_given(["model.kernels.adamw=cpu", " train.steps = 3", "checkpoint.keep_last="]) == {
        "model.kernels",
        "train.steps",
        "checkpoint.keep_last",
    }


def test_key_that_only_one_version_has():
    now = load_config(TOY).model_dump(exclude_none=True)
    older = {**now, "log": {}}  # as before these keys existed: they had their defaults
    assert all(change.outcome == "harmless" for change in changes(now, older, ()))
    newer = {**now, "train": {**now["train"], "momentum": 0.5}}
    (change,) = changes(now, newer, ())
    assert (change.key, change.outcome) == ("train.momentum", "refused")
    assert "use the version that wrote it" in change.reason
