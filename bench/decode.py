"""Decoding: medlora beside Transformers + PEFT and, where it is installed, Unsloth, in one call.

    python bench/decode.py [--model FOLDER] [--out result.json]      on a GPU
    python bench/decode.py --settings first,1,8                      on a CPU: the embedded base
    python bench/decode.py --tiny                                    a rehearsal

On a GPU without --model the base has Llama-2-7B's shape, or that of --shape, and random weights (`bases.py`), in NF4;
on a CPU it is the embedded one. Every side decodes greedily through an unmerged LoRA adapter, from the same random
tokens, past any end token, in a process of its own.

    1 ... 64   that many prompts of 20 tokens at once, 200 tokens each: tokens a second, prefill included
    first      milliseconds to the first token of a 1,000-token prompt
    long       a prompt of 3,900 tokens and 100 more: peak of allocated memory (on a CPU of the process)
    many       medlora only: memory after 2,000 requests beyond that after 200

Figures are medians over `--repeats` calls after two that warm up. For batch 1 the bytes of all weights that a token
reads, over its time, stand beside the bandwidth of a copy in the same process (bytes read and written).
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from bases import add_shape, build_base

SIDES = ("medlora", "transformers", "unsloth")
ADAPTERS = {"qv": ["q_proj", "v_proj"], "all": "all-linear"}
SETTINGS = ("1", "first", "long", "8", "32", "64", "many")
"""In this order: what a large batch takes, the engine holds on to."""
Generate = Callable[[list[list[int]], int], list[list[int]]]
"""Prompts of one length and how many tokens each gets -> the tokens."""


def load(arguments: Any) -> Any:
    """The base in NF4 with an adapter whose B is not zero."""
    from peft import LoraConfig, get_peft_model

    from medlora.model.adapter import only_to_answer
    from medlora.model.base import resolve
    from medlora.model.load import load_model
    from medlora.recipe import Base

    torch.manual_seed(0)  # the adapter's A is random
    base = Base(model=str(arguments.model or "embedded"))
    lora = LoraConfig(r=arguments.r, lora_alpha=16, target_modules=ADAPTERS[arguments.adapter], task_type="CAUSAL_LM")
    if arguments.side == "unsloth":
        from unsloth import FastLanguageModel

        model, _ = FastLanguageModel.from_pretrained(str(arguments.model), load_in_4bit=True, max_seq_length=4096)
        model = FastLanguageModel.get_peft_model(
            model, r=arguments.r, lora_alpha=16, target_modules=_modules(arguments)
        )
        FastLanguageModel.for_inference(model)
    else:
        model = get_peft_model(load_model(resolve(base), base), lora).eval()
        model = only_to_answer(model) if arguments.side == "medlora" else model  # as `Assistant.load` does
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    return model


def _modules(arguments: Any) -> list[str]:
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return every if arguments.adapter == "all" else ["q_proj", "v_proj"]


def ours(model: Any, draft: bool | None) -> Generate:
    from medlora.generate.engine import Engine
    from medlora.generate.request import Request
    from medlora.generate.sampling import Sampling

    engine = Engine(model, draft=draft)

    def generate(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        requests = [Request(ids, Sampling(max_new_tokens=tokens), "default") for ids in prompts]
        return [[token.id for token in found] for found in engine.generate(requests)]

    return generate


def theirs(model: Any) -> Generate:
    model.generation_config.eos_token_id = None
    model.config.use_cache = True

    @torch.inference_mode()
    def generate(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts, device=model.device)
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens,
            do_sample=False, use_cache=True, pad_token_id=0,
        )  # fmt: skip
        found: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return found

    return generate


class Prompts:
    """Random prompts, never the same twice: no side may answer from a cache of prefixes."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary, self.generator = vocabulary, torch.Generator().manual_seed(1)

    def __call__(self, rows: int, length: int) -> list[list[int]]:
        found: list[list[int]] = torch.randint(3, self.vocabulary, (rows, length), generator=self.generator).tolist()
        return found


def timed(generate: Generate, prompts: Prompts, rows: int, length: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Median, shortest and longest seconds of a call, and the tokens of the last."""
    seconds: list[float] = []
    for _ in range(repeats + 2):
        asked = prompts(rows, length)
        synchronize()
        began = time.perf_counter()
        found = generate(asked, tokens)
        synchronize()
        seconds.append(time.perf_counter() - began)
    assert all(len(row) == tokens for row in found)
    seconds = seconds[2:]
    return {
        "seconds": statistics.median(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "ids": found[0][:16],
    }


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_gib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def used_gib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 2**30
    import psutil

    return float(psutil.Process().memory_info().rss) / 2**30


def copy_bandwidth(device: torch.device) -> float:
    """GB/s, bytes read and written."""
    source = torch.zeros(2**30 if device.type == "cuda" else 2**28, dtype=torch.uint8, device=device)
    to, best = torch.empty_like(source), 0.0
    for _ in range(10):
        synchronize()
        began = time.perf_counter()
        to.copy_(source)
        synchronize()
        best = max(best, 2 * len(source) / (time.perf_counter() - began) / 1e9)
    return best


def weight_bytes(model: Any) -> int:
    """Of all weights that a decoded token reads, as they are stored: not the embedding, unless the head shares it."""
    from medlora.kernels.nf4 import stored_scales

    base = model.get_base_model()
    embedding = base.get_input_embeddings().weight
    skipped = set() if base.get_output_embeddings().weight is embedding else {id(embedding)}
    total = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in skipped)
    states = [p.quant_state for p in model.parameters() if hasattr(p, "quant_state")]
    return int(total + sum(stored_scales(state).nbytes for state in states))


def measure(name: str, generate: Generate, prompts: Prompts, arguments: Any) -> dict[str, Any]:
    tokens, repeats = arguments.tokens, arguments.repeats
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if name == "first":
        return timed(generate, prompts, 1, 64 if arguments.tiny else 1000, 1, repeats)
    if name == "long":
        generate(prompts(1, 400 if arguments.tiny else 3900), 100)
        return {"peak_gib": peak_gib()}
    if name == "many":
        for i in range(0, arguments.requests, 50):
            if i == arguments.requests // 10 // 50 * 50:
                before = used_gib()
            generate(prompts(50, 20), 4)
        return {"growth_gib": used_gib() - before}
    found = timed(generate, prompts, int(name), 20, tokens, repeats)
    return found | {"tokens_per_second": int(name) * tokens / found["seconds"], "peak_gib": peak_gib()}


def run_side(arguments: Any) -> dict[str, Any]:
    model = load(arguments)
    generate = ours(model, False if arguments.no_draft else None) if arguments.side == "medlora" else theirs(model)
    prompts = Prompts(model.config.vocab_size)
    results: dict[str, Any] = {}
    for name in arguments.settings.split(","):
        if name == "many" and arguments.side != "medlora":
            continue
        try:
            results[name] = measure(name, generate, prompts, arguments)
        except torch.OutOfMemoryError:
            results[name] = {"error": "out of memory"}
        print(arguments.adapter, name, results[name], file=sys.stderr)
    results["copy_gb"] = copy_bandwidth(model.device)
    results["weight_gb"] = weight_bytes(model) / 1e9
    return results


def report(found: dict[str, dict[str, Any]]) -> None:
    for name in SETTINGS:
        for side, results in found.items():
            row = results.get(name)
            if row:
                print(f"{name:>6}  {side:20}{_figure(name, row)}")
    for side, results in found.items():
        if "copy_gb" in results and "1" in results:
            size, copy = results["weight_gb"], results["copy_gb"]
            reached = size * results["1"].get("tokens_per_second", 0.0)
            print(f"        {side:20}{size:.2f} GB a token: {reached:.0f} of {copy:.0f} GB/s")


def _figure(name: str, row: dict[str, Any]) -> str:
    if "error" in row:
        return str(row["error"])
    if name == "first":
        return f"{1e3 * row['seconds']:10.1f} ms"
    if name in ("long", "many"):  # the peak of the process, or what it grew by
        return f"{row.get('peak_gib', row.get('growth_gib')):10.2f} GiB"
    return f"{row['tokens_per_second']:10.1f} tokens/s  {row['peak_gib']:6.2f} GiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--model", type=Path, help="a base's folder")
    add_shape(parser)
    parser.add_argument("--adapters", default="qv,all" if on_gpu else "all")
    parser.add_argument("--settings", default=",".join(SETTINGS))
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--r", type=int, default=64 if on_gpu else 16)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--no-draft", action="store_true", help="medlora without prompt lookup")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--adapter", choices=list(ADAPTERS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        from medlora.privacy import quiet

        quiet(offline=True, compiler=True)
        print(json.dumps(run_side(arguments)))
        return
    with TemporaryDirectory(dir="/dev/shm" if on_gpu and Path("/dev/shm").is_dir() else None) as folder:
        if not arguments.model and (on_gpu or arguments.tiny):
            build_base(Path(folder), arguments.shape, tiny=arguments.tiny)
            arguments.model = Path(folder)
        sides = [side for side in arguments.sides.split(",") if side != "unsloth" or find_spec("unsloth")]
        pairs = [(side, adapter) for adapter in arguments.adapters.split(",") for side in sides]
        found = {f"{side} ({adapter})": _run(side, adapter, arguments) for side, adapter in pairs}
    report(found)
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=2) + "\n")


def _run(side: str, adapter: str, arguments: Any) -> dict[str, Any]:
    command = [sys.executable, __file__, "--side", side, "--adapter", adapter, "--settings", arguments.settings]
    command += ["--model", str(arguments.model)] if arguments.model else []
    for name in ("r", "tokens", "repeats", "requests"):
        command += [f"--{name}", str(getattr(arguments, name))]
    command += [flag for flag, on in (("--tiny", arguments.tiny), ("--no-draft", arguments.no_draft)) if on]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"TOKENIZERS_PARALLELISM": "0"})
    if done.returncode:
        return {name: {"error": f"exit status {done.returncode}"} for name in arguments.settings.split(",")}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
