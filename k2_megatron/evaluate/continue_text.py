"""Continue a prompt with a trained model: seeded sampling, one token at a time."""

from collections.abc import Sequence

import torch


def continue_tokens(
    model: torch.nn.Module,
    prompt: Sequence[int],
    *,
    new_tokens: int,
    sequence_length: int,
    end_of_document: int | None,
    temperature: float,
    top_k: int,
    seed: int,
) -> list[int]:
    """The token ids that follow `prompt`: at most `new_tokens`, ending early at `end_of_document`.

    Each token is drawn from the `top_k` likeliest of softmax(logits / temperature) (Fan et al. 2018, top-k sampling);
    at temperature 0 the likeliest is taken. Every step runs the whole window again: right for a look at a model, slow
    for a service. ValueError for a prompt that leaves no room in the window.
    """
    if not 0 < len(prompt) < sequence_length:
        raise ValueError(f"the prompt has {len(prompt)} tokens; the model's window takes 1 to {sequence_length - 1}")
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(min(new_tokens, sequence_length - len(prompt))):
        # Padded to the full window: attention is causal, so what stands behind the last token changes nothing.
        window = torch.zeros(1, sequence_length, dtype=torch.int64, device=device)
        window[0, : len(tokens)] = torch.tensor(tokens)
        with torch.no_grad():
            logits_BSV = model(window, None, None)
        logits_V = logits_BSV[0, len(tokens) - 1].float().cpu()
        best = torch.topk(logits_V, min(top_k, len(logits_V)) if temperature > 0 else 1)
        behind = best.values - best.values[0]  # divided as they are, large logits would overflow to inf - inf
        weights = torch.softmax(behind / (temperature or 1.0), dim=0)
        token = int(best.indices[torch.multinomial(weights, 1, generator=generator)])
        if token == end_of_document:
            break
        tokens.append(token)
    return tokens[len(prompt) :]
