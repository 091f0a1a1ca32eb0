"""One task on one side of the adapter, item by item, from model to stored lines."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import takewhile
from typing import Any, cast

from medlora.data.prompts import IGNORE, Example, render
from medlora.evaluate import claims, similarity
from medlora.evaluate.letters import MAX_NEW_TOKENS, letter_prompt, parse_letter
from medlora.evaluate.likelihood import Request, choice_request, loss_request, predict, score
from medlora.evaluate.metrics import TARGET
from medlora.evaluate.store import Line, Store
from medlora.evaluate.tasks.base import Choice, Passage, Task
from medlora.evaluate.tasks.memorisation import HINT
from medlora.generate.answer import Assistant
from medlora.generate.sampling import Sampling
from medlora.progress import bar
from medlora.recipe import Recipe

ANSWERS_AT_ONCE = 16


def score_task(assistant: Assistant, recipe: Recipe, task: Task, store: Store, *, tuned: bool) -> None:
    """Score what the store does not hold yet; every line is on disk before the bar moves.

    Raises:
        DataError: a held-out row that the recipe refuses. ModelError: a question longer than the context.
    """
    scorers: dict[str, Callable[..., Iterator[Line]]] = {
        "choice": _choices, "loss": _losses, "letter": _letters, "answer": _answers, "memory": _memories,
    }  # fmt: skip
    left = [item for item in task.items if item.id not in store.done]
    side = "tuned" if tuned else "untuned"
    assistant.model.eval()
    with bar(f"{task.name}, {side}", len(task.items)) as progress:
        progress.advance(len(task.items) - len(left))
        for line in scorers[task.kind](assistant, recipe, left, tuned):
            store.add(line)
            progress.advance(1, running(task.kind, store.lines))


def running(kind: str, lines: Sequence[Line]) -> str:
    """The score so far, in a few words."""
    if kind in ("loss", "memory"):
        return f"loss {sum(x['nll'] for x in lines) / max(sum(x['tokens'] for x in lines), 1):.3f}"
    name = "rougeL" if kind == "answer" else "acc"
    return f"{'ROUGE-L' if kind == 'answer' else name} {sum(x[name] for x in lines) / len(lines):.3f}"


def _side(assistant: Assistant, tuned: bool) -> AbstractContextManager[Any]:
    off = assistant.has_adapter and not tuned
    return cast(AbstractContextManager[Any], assistant.model.disable_adapter() if off else nullcontext())


def _scores(assistant: Assistant, requests: Sequence[Request], tuned: bool) -> Iterator[list[float]]:
    return _each(assistant, score(assistant.model, requests), tuned)


def _each(assistant: Assistant, batches: Iterator[list[Any]], tuned: bool) -> Iterator[Any]:
    """What is found for each request; the adapter is back in its place whenever the caller has the turn."""
    while True:
        with _side(assistant, tuned):
            found = next(batches, None)
        if found is None:
            return
        yield from found


def _choices(assistant: Assistant, recipe: Recipe, items: Sequence[Choice], tuned: bool) -> Iterator[Line]:
    return choice_lines(assistant, items, tuned=tuned)


def choice_lines(assistant: Assistant, items: Sequence[Choice], *, tuned: bool) -> Iterator[Line]:
    """An item line for each question, in order; `cut` stands in it where the prompt lost its left end."""
    context: int = assistant.model.config.max_position_embeddings
    requests = [
        choice_request(assistant.tokenizer, item.prompt, [f" {option}" for option in item.options], context)
        for item in items
    ]
    for item, request, values in zip(items, requests, _scores(assistant, requests, tuned), strict=True):
        yield _choice_line(item, values) | ({"cut": request.cut} if request.cut else {})


def _choice_line(item: Choice, values: list[float]) -> Line:
    """acc and acc_norm as lm-evaluation-harness defines them: the largest likelihood, whole or a character."""
    lengths = [len(option) for option in item.options]
    norm = [value / length for value, length in zip(values, lengths, strict=True)]
    return {
        "id": item.id, "prompt": item.prompt, "group": item.group,
        "options": list(item.options), "loglikelihoods": values, "lengths": lengths, "answer": item.answer,
        "acc": int(values.index(max(values)) == item.answer), "acc_norm": int(norm.index(max(norm)) == item.answer),
    }  # fmt: skip


def _losses(assistant: Assistant, recipe: Recipe, items: Sequence[Passage], tuned: bool) -> Iterator[Line]:
    tokenizer = assistant.tokenizer
    rows = [(item, example) for item in items for example in item.examples(tokenizer, recipe)]
    scores = _scores(assistant, [loss_request(example) for _, example in rows], tuned)
    held: list[tuple[Example, float]] = []
    for n, ((item, example), (value,)) in enumerate(zip(rows, scores, strict=True), 1):
        held.append((example, -value))
        if n == len(rows) or rows[n][0] is not item:  # the last piece of a row that was split
            yield _loss_line(tokenizer, item, held)
            held = []


def _loss_line(tokenizer: Any, item: Passage, pieces: list[tuple[Example, float]]) -> Line:
    """`bytes` counts what the labelled tokens say; special tokens and the template's outer space
    say nothing, though their loss counts."""
    labelled = [label for example, _ in pieces for label in example.labels if label != IGNORE]
    first = next(i for i, label in enumerate(pieces[0][0].labels) if label != IGNORE)
    said = tokenizer.decode(labelled, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return {
        "id": item.id, "prompt": tokenizer.decode(pieces[0][0].input_ids[:first]), "group": item.group,
        "nll": sum(nll for _, nll in pieces), "tokens": len(labelled), "bytes": len(said.strip().encode()),
    }  # fmt: skip


def _memories(assistant: Assistant, recipe: Recipe, items: Sequence[Passage], tuned: bool) -> Iterator[Line]:
    """`reproduced`: how many tokens of the target are the likeliest up to the first that is not; None for an answer too
    short to be asked."""
    tokenizer = assistant.tokenizer
    rows = [(item, example) for item in items for example in item.examples(tokenizer, recipe)[:1]]
    found = _each(assistant, predict(assistant.model, [loss_request(example) for _, example in rows]), tuned)
    for (item, example), (tokens,) in zip(rows, found, strict=True):
        labelled = [i for i, label in enumerate(example.labels) if label != IGNORE]
        asked = labelled[HINT : HINT + TARGET]
        matched = takewhile(lambda token: token[1], tokens[HINT : HINT + TARGET])
        whole = len(asked) == TARGET
        yield {
            "id": item.id, "prompt": tokenizer.decode(example.input_ids[: asked[0]] if whole else []),
            "group": item.group, "nll": -sum(value for value, _ in tokens), "tokens": len(tokens),
            "reproduced": len(list(matched)) if whole else None,
        }  # fmt: skip


def _letters(assistant: Assistant, recipe: Recipe, items: Sequence[Choice], tuned: bool) -> Iterator[Line]:
    settings = Sampling(max_new_tokens=MAX_NEW_TOKENS)
    for batch in _batches(items):
        asked = [[("user", letter_prompt(item))] for item in batch]
        for item, messages, answer in zip(
            batch, asked, assistant.answer_many(asked, settings, tuned=tuned), strict=True
        ):
            parsed = parse_letter(answer.text, item.texts)
            yield {
                "id": item.id, "prompt": render(assistant.tokenizer, messages, ask=True), "group": item.group,
                "generated": answer.text, "parsed": parsed, "answer": item.answer, "acc": int(parsed == item.answer),
            }  # fmt: skip


def _answers(assistant: Assistant, recipe: Recipe, items: Sequence[Passage], tuned: bool) -> Iterator[Line]:
    settings = Sampling.from_recipe(recipe.generation).override(seed=recipe.training.seed)
    judge = similarity.scorer()
    for batch in _batches(items):
        asked = [item.record.messages[:-1] for item in batch]
        for item, messages, answer in zip(
            batch, asked, assistant.answer_many(asked, settings, tuned=tuned), strict=True
        ):
            reference = item.record.messages[-1][1]
            yield {
                "id": item.id, "prompt": render(assistant.tokenizer, messages, ask=True), "group": item.group,
                "question": messages[-1][1], "reference": reference, "answer": answer.text,
                "seconds": round(answer.seconds, 3), "finished": answer.finished, "tokens": answer.tokens,
                **judge(answer.text, reference), "claims": claims.compare(answer.text, reference),
            }  # fmt: skip


def _batches(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), ANSWERS_AT_ONCE):
        yield items[start : start + ANSWERS_AT_ONCE]
