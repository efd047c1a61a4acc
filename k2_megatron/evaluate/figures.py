"""From losses of units (rows, documents) or marks of questions to means with their standard errors."""

import math
from collections.abc import Sequence

Figure = float | int | None


def loss_figures(nats: Sequence[float], tokens: Sequence[int], size: int | None = None) -> dict[str, Figure]:
    """Of units with `nats` over so many `tokens` each, and `size` bytes of text in all where they are known.

    The loss is a ratio of sums; its standard error is over units, by linearization (Cochran, Sampling Techniques, 1977,
    section 6.4): tokens of one document are no independent draws, documents are taken for such.
    """
    total, count = math.fsum(nats) if all(map(math.isfinite, nats)) else sum(nats), sum(tokens)
    loss = total / count
    return {
        "loss": loss,
        "loss_error": _ratio_error(nats, tokens, loss),
        "perplexity": perplexity(loss),
        "bits_per_byte": None if size is None else total / math.log(2) / size,
        "tokens": count,
    }


def perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf if loss == loss else loss


def _ratio_error(nats: Sequence[float], tokens: Sequence[int], loss: float) -> float | None:
    units = len(nats)
    if units < 2:
        return None
    squares = sum((one - loss * count) ** 2 for one, count in zip(nats, tokens, strict=True))
    return math.sqrt(squares * units / (units - 1)) / sum(tokens)


def mean_figures(name: str, values: Sequence[float]) -> dict[str, Figure]:
    """{name: the mean, name_error: its standard error, None for one value alone}, as lm-evaluation-harness has them."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return {name: mean, f"{name}_error": None}
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return {name: mean, f"{name}_error": math.sqrt(variance / len(values))}
