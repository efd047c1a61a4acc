"""The spike detector on synthetic losses: every kind of spike found, none where there is none, delays printed."""

import json

import numpy as np
import pytest

from k2_megatron.config.schema import Spikes
from k2_megatron.train.spikes.detector import Finding, State, observe, restore

SETTINGS = Spikes()


def signals(steps: int, seed: int, noise: str = "normal") -> tuple[np.ndarray, np.ndarray]:
    """Losses and gradient norms of a healthy run: a power law that falls, noise, norms that scatter by factors."""
    random = np.random.default_rng(seed)
    draws = {
        "normal": lambda: random.standard_normal(steps),
        "heavy tails": lambda: random.standard_t(3, steps),  # needles of 20 standard deviations and more
        "correlated": lambda: _correlated(random, steps, 0.7),
    }
    losses = 1.5 + 6.0 * (np.arange(steps) + 50.0) ** -0.4 + 0.01 * draws[noise]()
    return losses, 0.3 * np.exp(0.1 * draws[noise]())


def _correlated(random, steps: int, memory: float) -> np.ndarray:
    values = random.standard_normal(steps)
    for number in range(1, steps):
        values[number] = memory * values[number - 1] + (1 - memory**2) ** 0.5 * values[number]
    return values


def watch(losses, norms, settings: Spikes = SETTINGS) -> list[Finding]:
    state, findings = State(), []
    for number, (loss, norm) in enumerate(zip(losses, norms, strict=True), start=1):
        state, finding = observe(state, settings, number, float(loss), float(norm))
        findings += [finding] if finding else []
    return findings


@pytest.mark.parametrize("noise", ["normal", "heavy tails", "correlated"])
def test_no_false_alarm_in_5000_clean_steps(noise):
    for seed in range(4):
        assert watch(*signals(5000, seed, noise)) == []


def test_needle_of_any_height_is_no_spike():
    losses, norms = signals(1000, 1)
    losses[500], norms[500] = 7.5, 400.0
    losses[700:702], norms[700:702] = 50.0, 4000.0
    assert watch(losses, norms) == []


def with_fault(fault: str, losses: np.ndarray, norms: np.ndarray, at: int, length: int) -> None:
    """Change the signals from step `at` + 1 as the fault would in a large run."""
    rows = slice(at, at + length)
    shape = np.exp(-3.0 * np.arange(length) / length)  # it fades
    if fault == "poisoned batches":
        losses[rows] += 0.4
        norms[rows] *= 5.0
    elif fault == "learning-rate jump":
        losses[rows] += 1.5 * np.minimum(1.0, np.arange(length) / 10) * shape + 0.1
        norms[rows] *= 1 + 4 * shape
    elif fault == "corrupted moment":
        losses[rows] += 3.0 * shape + 0.1
    elif fault == "label noise":
        losses[rows] += 0.15
    elif fault == "gradient only":
        norms[rows] *= 20.0


FAULTS = ["poisoned batches", "learning-rate jump", "corrupted moment", "label noise", "gradient only"]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("length", "kind"), [(40, "benign"), (600, "malignant")])
def test_injected_fault_is_found_and_judged(fault, length, kind):
    delays = []
    for seed in range(5):
        losses, norms = signals(2000, seed)
        with_fault(fault, losses, norms, at=1200, length=length)
        spike, verdict = watch(losses, norms)[:2]
        assert (spike.kind, verdict.kind) == ("spike", kind)
        assert 1195 <= spike.onset <= 1210, "the beginning is found, not only the moment it was noticed"
        if kind == "benign":
            assert 1240 <= verdict.step <= 1250
        else:
            assert verdict.step == verdict.onset + SETTINGS.benign_steps
        delays.append(spike.trip - 1200)
    print(f"{fault}, {kind}: called after {delays} steps")
    assert max(delays) <= 12


def test_watching_goes_on_from_a_stored_state_as_if_never_stopped():
    losses, norms = signals(900, 3)
    with_fault("poisoned batches", losses, norms, at=400, length=300)
    whole = watch(losses, norms)
    for cut in (100, 403, 450):
        state, findings = State(), []
        for number in range(900):
            if number == cut:
                state = restore(json.loads(json.dumps(state.plain())))
            state, finding = observe(state, SETTINGS, number + 1, float(losses[number]), float(norms[number]))
            findings += [finding] if finding else []
        assert findings == whole
    assert [finding.kind for finding in whole] == ["spike", "malignant"]


def test_after_a_malignant_spike_the_new_level_becomes_the_norm():
    losses, norms = signals(2000, 5)
    losses[800:] += 0.5
    losses[1500:1530] += 0.5
    assert [finding.kind for finding in watch(losses, norms)] == ["spike", "malignant", "spike", "benign"]


def test_every_key_of_the_section_changes_what_is_found():
    losses, norms = signals(1200, 2)
    with_fault("poisoned batches", losses, norms, at=600, length=40)
    usual = watch(losses, norms)
    assert [finding.kind for finding in usual] == ["spike", "benign"]
    for key, value in (("threshold", 300.0), ("benign_steps", 20), ("window_steps", 1000)):
        assert watch(losses, norms, Spikes(**{key: value})) != usual, key


# The layers


def layer_signals(steps: int, layers: int, seed: int, noise: str = "normal") -> list[dict]:
    """What healthy steps tell of their layers: outputs that grow with the depth and the run, gradients that scatter."""
    random = np.random.default_rng(seed)
    draws = {
        "normal": lambda shape: random.standard_normal(shape),
        "heavy tails": lambda shape: random.standard_t(3, shape),
    }[noise]
    depth = np.arange(1, layers + 1) / layers
    outputs = depth * (1 + np.log1p(np.arange(steps) / 100.0))[:, None] * np.exp(0.01 * draws((steps, layers)))
    gradients = 0.2 * np.exp(0.15 * draws((steps, layers)))
    return [
        {
            "gradient_norm": gradients[step].tolist(),
            "activation_rms": outputs[step].tolist(),
            "embedding_gradient_norm": float(gradients[step, 0]),
            "output_gradient_norm": float(gradients[step, -1]),
        }
        for step in range(steps)
    ]


def watch_layers(losses, norms, layers, settings: Spikes = SETTINGS, stops: tuple[int, ...] = ()) -> list[Finding]:
    """As `watch`, with the state stored and read back before the steps of `stops`."""
    state, findings = State(), []
    for number, (loss, norm, of_step) in enumerate(zip(losses, norms, layers, strict=True)):
        if number in stops:
            state = restore(json.loads(json.dumps(state.plain())))
        state, finding = observe(state, settings, number + 1, float(loss), float(norm), of_step)
        findings += [finding] if finding else []
    return findings


def test_no_false_alarm_of_layers_in_5000_clean_steps():
    noise = "heavy tails"
    layers = layer_signals(5000, 8, 11, noise)
    found = watch_layers(*signals(5000, 11, noise), layers)
    print(
        f"{noise}: {len(found)} false alarms in {len(layers)} clean steps of {len(layers[0]['gradient_norm'])} layers"
    )
    assert found == []


def in_layer(layers: list[dict], name: str, number: int, factor: float, steps: slice) -> list[dict]:
    for of_step in layers[steps]:
        of_step[name][number - 1] *= factor
    return layers


@pytest.mark.parametrize("name", ["activation_rms", "gradient_norm"])
def test_one_layer_calls_a_spike_and_is_named(name):
    losses, norms = signals(500, 6)
    layers = in_layer(layer_signals(500, 8, 6), name, 5, 3.0, slice(300, 330))
    spike, verdict = watch_layers(losses, norms, layers)
    print(f"{name} of one layer times 3: called after {spike.trip - 300} steps")
    assert (spike.kind, verdict.kind) == ("spike", "benign")
    assert spike.trip - 300 <= 8
    assert spike.onset == 301
    assert spike.layers[0].signal == f"{name} of layer 5"
    assert spike.layers[0].value == pytest.approx(3 * spike.layers[0].usual, rel=0.7)
    assert spike.loss_deviation < 3 and spike.norm_deviation < 3


def test_layer_that_stays_at_a_new_level_is_told_of_once_and_is_not_malignant():
    losses, norms = signals(900, 6)
    layers = in_layer(layer_signals(900, 8, 6), "activation_rms", 2, 2.0, slice(300, None))
    found = watch_layers(losses, norms, layers)
    assert [finding.kind for finding in found] == ["spike", "benign"]
    assert found[1].step == found[1].onset + SETTINGS.benign_steps
    assert found[1].layers[0].signal == "activation_rms of layer 2", "the verdict says what has not come back"


def every_tenth(layers: list[dict]) -> list[dict | None]:
    return [of_step if number % 10 == 9 else None for number, of_step in enumerate(layers)]


def test_layers_are_watched_on_after_a_benign_spike_of_the_loss():
    """Told of at every tenth step, they take 1,280 steps to be measured anew."""
    losses, norms = signals(2400, 6)
    layers = every_tenth(in_layer(layer_signals(2400, 8, 6), "activation_rms", 5, 10.0, slice(2200, None)))
    assert [finding.trip for finding in watch_layers(losses, norms, layers)] == [2240, 2240]
    losses[2000:2015] += 0.4
    for disturbed in (False, True):
        for layer in range(8 if disturbed else 0):
            in_layer(layers[2009:2010], "activation_rms", layer + 1, 4.0, slice(0, 1))
        found = watch_layers(losses, norms, layers, stops=(2005, 2100))
        assert [(finding.kind, finding.onset) for finding in found[:2]] == [("spike", 2001), ("benign", 2001)]
        assert [(finding.kind, finding.trip) for finding in found[2:]] == [("spike", 2240), ("benign", 2240)], disturbed


def test_only_a_layer_that_stays_at_a_new_level_is_measured_anew():
    losses, norms = signals(1100, 6)
    layers = in_layer(layer_signals(1100, 8, 6), "activation_rms", 2, 2.0, slice(300, None))
    in_layer(layers, "activation_rms", 5, 3.0, slice(420, 440))
    in_layer(layers, "activation_rms", 2, 2.0, slice(450, None))  # again while its measure is not full: not seen
    in_layer(layers, "activation_rms", 2, 3.0, slice(900, 920))
    found = watch_layers(losses, norms, layers, stops=(410, 500))
    told = [(finding.kind, finding.onset, finding.layers[0].signal) for finding in found if finding.kind == "spike"]
    assert told == [
        ("spike", 301, "activation_rms of layer 2"),
        ("spike", 421, "activation_rms of layer 5"),
        ("spike", 901, "activation_rms of layer 2"),
    ]


def test_layer_that_goes_first_dates_the_spike():
    losses, norms = signals(900, 6)
    losses[310:], norms[310:] = losses[310:] + 0.4, norms[310:] * 5
    layers = in_layer(layer_signals(900, 8, 6), "gradient_norm", 7, 6.0, slice(300, None))
    spike, verdict = watch_layers(losses, norms, layers)[:2]
    assert (spike.onset, verdict.kind) == (301, "malignant"), "going back to step 305 would keep the layer's trouble"


CREEPING = [("spike", 2010), ("benign", 2010)]  # what a layer that goes up by 23 % at 2001 makes, called at 2330


@pytest.mark.parametrize(
    ("up", "expected"),
    [
        (slice(2327, 2347), [("spike", 2328), ("benign", 2328)]),
        (slice(2327, None), [("spike", 2328), ("malignant", 2328)]),
        (slice(2329, None), [("spike", 2010), ("malignant", 2330)]),  # the layer alone, when it is called
        (slice(2400, 2420), [*CREEPING, ("spike", 2401), ("benign", 2401)]),
    ],
)
def test_layer_that_was_creeping_takes_none_of_the_patience_and_does_not_date_what_is_amended(up, expected):
    losses, norms = signals(2600, 6)
    layers = every_tenth(in_layer(layer_signals(2600, 8, 6), "activation_rms", 5, 1.23, slice(2000, None)))
    losses[up] += 0.5
    found = watch_layers(losses, norms, layers, stops=(2100, 2329, 2410))
    assert [(finding.kind, finding.onset) for finding in found[: len(expected)]] == expected
    if found[1].kind == "malignant":
        assert found[1].step == found[1].onset + SETTINGS.benign_steps


def test_patience_lowered_while_a_layer_is_up_does_not_end_what_is_amended_before_the_loss_rose():
    losses, norms = signals(400, 6)
    layers = in_layer(layer_signals(400, 8, 6), "gradient_norm", 7, 6.0, slice(300, None))
    losses[340:] += 0.4
    state, found, settings = State(), [], SETTINGS
    for number in range(400):
        if number == 346:  # changed at a restart
            settings = Spikes(benign_steps=20)
        state, finding = observe(
            state, settings, number + 1, float(losses[number]), float(norms[number]), layers[number]
        )
        found += [finding] if finding else []
    assert [(finding.kind, finding.onset) for finding in found[:2]] == [("spike", 301), ("malignant", 341)]
    assert found[0].trip < 341 <= found[1].trip <= found[1].step


def test_layers_are_watched_on_from_a_stored_state_as_if_never_stopped():
    losses, norms = signals(500, 6)
    layers = in_layer(layer_signals(500, 3, 6), "gradient_norm", 2, 6.0, slice(300, 340))
    for number in range(500):  # told of at every other step
        if number % 2:
            layers[number] = None
    whole = watch_layers(losses, norms, layers)
    assert [finding.kind for finding in whole] == ["spike", "benign"]
    assert watch_layers(losses, norms, layers, stops=(100, 303, 309, 320, 345)) == whole


# The samples


def highest_losses(steps: int, seed: int) -> np.ndarray:
    """The highest loss of a sample in batches of a healthy run: above the mean, with a heavy tail."""
    return 2.5 + 0.3 * np.abs(np.random.default_rng(seed).standard_t(3, steps))


def watch_samples(losses, norms, highest, stops: tuple[int, ...] = ()) -> list[Finding]:
    state, findings = State(), []
    for number, values in enumerate(zip(losses, norms, highest, strict=True)):
        if number in stops:
            state = restore(json.loads(json.dumps(state.plain())))
        loss, norm, value = map(float, values)
        state, finding = observe(state, SETTINGS, number + 1, loss, norm, None, value)
        findings += [finding] if finding else []
    return findings


def test_no_false_alarm_of_samples_in_5000_clean_steps():
    for seed in range(4):
        assert watch_samples(*signals(5000, seed), highest_losses(5000, seed)) == []


def test_one_bad_row_of_a_large_batch_calls_a_spike_and_is_named():
    """Its share of the mean is below the noise."""
    losses, norms, highest = *signals(600, 6), highest_losses(600, 6)
    highest[300:320] = 9.0
    found = watch_samples(losses, norms, highest)
    spike, verdict = found
    assert (spike.kind, spike.onset, verdict.kind) == ("spike", 301, "benign")
    assert spike.trip - 300 <= 5
    assert [signal.signal for signal in spike.layers] == ["highest_sample_loss"]
    assert watch_samples(losses, norms, highest, stops=(100, 303, 310, 330)) == found
    highest[300:302], highest[302:] = 9.0, highest_losses(600, 6)[302:]
    assert watch_samples(losses, norms, highest) == [], "in one batch or two it is a needle"


def test_samples_that_stay_at_a_new_level_are_told_of_once():
    losses, norms, highest = *signals(900, 6), highest_losses(900, 6)
    highest[300:] *= 3.0
    assert [finding.kind for finding in watch_samples(losses, norms, highest)] == ["spike", "benign"]


def test_state_of_before_a_spike_had_a_beginning_of_its_own_is_read():
    old = State(losses=(1.0,), log_norms=(2.0,), onset=7, trip=9).plain()
    del old["began"]
    assert restore(old).began == 7
    assert restore({**old, "trip": None}).began is None, "none was called"


def test_state_from_before_layers_and_samples_were_watched_is_read():
    old = State(losses=(1.0,), log_norms=(2.0,)).plain()
    del old["layers"], old["samples"]
    assert restore(old) == State(losses=(1.0,), log_norms=(2.0,))
