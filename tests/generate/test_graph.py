"""The GPU's decode step through the kernels' plain references, beside the general pass; and captured, on a GPU."""

import copy
from typing import Any

import pytest
import torch

from medlora.generate.cache import Cache
from medlora.generate.decoder import Decoder, Pass, Span
from medlora.generate.engine import Engine
from medlora.generate.graph import Steps
from medlora.generate.request import Request
from medlora.generate.sampling import Sampling
from medlora.generate.weights import Nf4, _every_nth, _Lora
from medlora.kernels.nf4 import stored_scales

ADAPTERS = (None, "all", "some")


def prompt(seed: int, length: int) -> list[int]:
    return torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    """(NF4 modules of bitsandbytes, the same weights dequantised), each with two adapters."""
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    base = LlamaForCausalLM(config).eval()
    plain = copy.deepcopy(base)
    for name, module in list(base.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            four = bnb.nn.LinearNF4(module.in_features, module.out_features, bias=False, compute_dtype=torch.float32)
            weight = module.weight.data.bfloat16().float()  # whose scales bfloat16 holds
            four.weight = bnb.nn.Params4bit(
                weight, requires_grad=False, quant_type="nf4", blocksize=64, compress_statistics="mlp" in name
            )
            base.set_submodule(name, four.to("cpu"))
            weight = bnb.functional.dequantize_4bit(four.weight.data, four.weight.quant_state)
            plain.get_submodule(name).weight.data = weight.view(module.weight.shape)
    models = []
    for model in (base, plain):
        every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules=every), "all")
        model.add_adapter("some", LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"]))
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=generator)
        models.append(model.eval())
    return models[0], models[1]


def test_steps_over_codes_give_the_logits_of_plain_weights(pair: tuple[Any, Any]) -> None:
    """Rows of several lengths and adapters, a draft among them, and a batch that must be filled up."""
    rows = [(prompt(1, 70), 0, 1), (prompt(2, 5), -1, 3), (prompt(3, 130), 1, 1)]
    found = []
    for model in pair:
        decoder = Decoder(model)
        decoder.refresh()
        cache = Cache(2, decoder.heads[1:], decoder.dtype, decoder.device, 2**24)
        assert isinstance(decoder.layers[0].qkv.weight, Nf4) == (model is pair[0])
        with torch.inference_mode():
            spans, slots = [], [slot for _, slot, _ in rows]
            for ids, slot, new in rows:
                held = cache.take(ids, len(ids) + 8, slot)
                assert held
                decoder(torch.tensor(ids), Pass(decoder, [Span(held.blocks, 0, len(ids))], [slot]), cache)
                spans.append(Span(held.blocks, len(ids), new))
            tokens = torch.tensor([11, 12, 13, 14, 15])
            general = decoder.head(decoder(tokens, Pass(decoder, spans, slots), cache))
            steps = Steps(decoder, cache, graphs=False)
            for _ in range(2):
                torch.testing.assert_close(steps(tokens, spans, slots), general, rtol=1e-4, atol=1e-4)
            found.append(general)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("deleted", ["some", None])
def test_many_rows_over_kept_weights_give_the_logits_of_plain_ones(pair: tuple[Any, Any], deleted: str | None) -> None:
    """With one adapter the modules' terms go as a batch; a's are appended to the weights where they fit."""
    found, rows = [], 20
    slots = [i % (2 if deleted else 3) - 1 for i in range(rows)]
    for model in map(copy.deepcopy, pair):
        if deleted:
            model.delete_adapter(deleted)
        decoder = Decoder(model)
        decoder.refresh()
        cache = Cache(2, decoder.heads[1:], decoder.dtype, decoder.device, 2**24)
        spans = [Span(cache.take([i], 1, slot).blocks, 0, 1) for i, slot in enumerate(slots)]
        steps = Steps(decoder, cache, graphs=False)
        with torch.inference_mode():
            for _ in range(2):
                logits = steps(torch.arange(5, 5 + rows), spans, slots)
        found.append(logits)
        first = decoder.layers[0]
        assert (first.gate_up.batched is None) == (deleted is None)
        assert (first.gate_up.wide is not None) == isinstance(first.gate_up.weight, Nf4)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("ranks", "sizes", "expected"),
    [
        ((4, None, 4), (8, 8, 8), slice(0, 3, 2)),
        ((4, 4, 4), (8, 8, 8), slice(0, 3, 1)),
        ((None, 4, 4), (8, 8, 8), slice(1, 3, 1)),
        ((4, 2, 4), (8, 8, 8), None),
        ((4, 4, 4), (8, 4, 4), None),
        ((4, None, None), (8, 8, 8), None),
    ],
)
def test_which_terms_go_as_a_batch(ranks: Any, sizes: tuple[int, ...], expected: slice | None) -> None:
    loras = [_Lora(torch.zeros(r, 1), torch.zeros(1, r), 1.0) if r else None for r in ranks]
    assert _every_nth(loras, sizes, 4) == expected


def test_answers_over_codes_are_those_of_transformers_over_plain_weights(pair: tuple[Any, Any]) -> None:
    engine = Engine(pair[0])
    engine.step = Steps(engine.decoder, engine.cache, graphs=False)
    ids = prompt(4, 40)
    found = engine.generate([Request(ids, Sampling(max_new_tokens=30), a, frozenset({2})) for a in ("all", "some")])
    for adapter, tokens in zip(("all", "some"), found, strict=True):
        pair[1].set_adapter(adapter)
        target = pair[1].generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, 40), max_new_tokens=30, do_sample=False
        )
        assert [token.id for token in tokens] == target[0, 40:].tolist()


def test_modules_hold_views_that_bitsandbytes_still_reads(pair: tuple[Any, Any]) -> None:
    from bitsandbytes.functional import dequantize_4bit

    for _ in range(2):  # an engine may be made again
        held = Decoder(pair[0]).layers[0].qkv.weight.codes
        base, plain = (model.get_base_model().model.layers[0].self_attn.k_proj.base_layer for model in pair)
        assert held.absmax.dtype == torch.bfloat16
        for ours, theirs in ((held.codes, base.weight.data), (held.absmax, stored_scales(base.weight.quant_state))):
            assert ours.untyped_storage().data_ptr() == theirs.untyped_storage().data_ptr()
        assert torch.equal(dequantize_4bit(base.weight.data, base.weight.quant_state), plain.weight)


@pytest.mark.parametrize("length", [1, 16, 17, 32, 150])
def test_a_short_prompt_passes_through_steps(
    pair: tuple[Any, Any], length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 150 tokens the cache knows 128."""
    engine, ids = Engine(pair[0]), prompt(length, length)
    engine.step = Steps(engine.decoder, engine.cache, graphs=False)
    asked = [Request(ids, Sampling(max_new_tokens=12), adapter) for adapter in ADAPTERS]
    whole = [engine.generate([request])[0] for request in asked[:1]] + engine.generate(asked[1:])
    monkeypatch.setattr("medlora.generate.batch.Pass", None)
    again = [engine.generate([request])[0] for request in asked]
    assert [[t.id for t in tokens] for tokens in again] == [[t.id for t in tokens] for tokens in whole]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_steps_give_the_tokens_of_uncaptured_ones(toy_model: Any, dtype: torch.dtype) -> None:
    model = copy.deepcopy(toy_model).to("cuda", dtype)
    requests = [
        Request(
            prompt(i, 20 + 30 * i), Sampling(max_new_tokens=90 - i, temperature=i % 2 * 0.7, seed=i), ADAPTERS[i % 3]
        )
        for i in range(12)
    ]
    plain = Engine(model, rows=5, graphs=False).generate(requests)
    engine = Engine(model, rows=5)
    captured = engine.generate(requests)
    assert [[t.id for t in tokens] for tokens in captured] == [[t.id for t in tokens] for tokens in plain]
    if dtype == torch.float32:  # the shortest prompt through captured steps, the others' beginnings from the cache
        alone = [engine.generate([request])[0] for request in requests]
        assert [[t.id for t in tokens] for tokens in alone] == [[t.id for t in tokens] for tokens in plain]
