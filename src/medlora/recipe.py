"""A recipe: one YAML file that says everything about a run, read into typed, frozen objects.

Field names are those of Transformers, TRL and PEFT. Every field has a default, so a recipe states only what
differs; the resolved recipe, every field written out, is saved beside each run. Errors name the file, the line,
the field, the value, and what is allowed.
"""

import difflib
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from medlora.errors import RecipeError

EMBEDDED = "embedded"


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Base(Section):
    """The model that is tuned."""

    model: str = EMBEDDED
    """`embedded` (SmolLM2-135M-Instruct), a hub id, a folder, or a .gguf file."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    quantization: Literal["nf4", "none"] = "nf4"
    double_quant: bool = False
    """Quantise the NF4 scales too: 0.4 bits a weight less (QLoRA, arXiv:2305.14314)."""
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """`auto`: bfloat16 where the device computes in it, else float16 on a GPU and float32 on a CPU."""
    trust_remote_code: bool = False


class Columns(Section):
    """Which columns hold what: `text`, or `prompt` and `completion`, or `messages`.

    A value that holds braces is a format string over the row's columns: "What is {focus}?".
    """

    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None

    @model_validator(mode="after")
    def _one_shape(self) -> Self:
        shapes = [self.text is not None, self.prompt is not None or self.completion is not None]
        shapes.append(self.messages is not None)
        if sum(shapes) > 1:
            raise ValueError("give `text`, or `prompt` and `completion`, or `messages`; not more than one of them")
        if (self.prompt is None) != (self.completion is None):
            raise ValueError("`prompt` and `completion` go together")
        return self


class Data(Section):
    """What is learned from."""

    path: str = EMBEDDED
    """`embedded` (medical terms), a hub id, a file (.jsonl .json .csv .parquet .txt, also .gz), or a folder."""
    name: str | None = None
    """Configuration of a hub data set that has several."""
    revision: str | None = None
    split: str = "train"
    """Split of a hub data set."""
    columns: Columns = Columns()
    """Left out: `text`, `messages`, or `prompt` and `completion`, whichever the rows have."""
    valid_path: str | None = None
    """Held-out rows from a file of their own; they are never trained on."""
    valid_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of the groups held out where there is no `valid_path`. 0 holds nothing out."""
    group: str | None = None
    """Column (patient, document, topic) whose rows all stay on one side of the split."""
    split_seed: int = 0
    on_bad_row: Literal["skip", "error"] = "skip"
    max_bad_fraction: float = Field(0.05, ge=0, le=1)
    """With `skip`: refuse the data when a larger share of the rows is bad."""
    max_length: int = Field(1024, ge=8)
    """Tokens a row may have, prompt, answer and special tokens together."""
    on_long_row: Literal["drop", "split", "truncate", "error"] = "drop"
    on_identifiers: Literal["report", "drop", "error", "ignore"] = "report"
    """Rows that look as if they held a name, a number or a date of a person."""
    max_rows: int | None = Field(None, ge=1)
    """Train on the first so many rows only."""


class Prompt(Section):
    """How a question and its answer become one text."""

    template: Literal["base", "llama2"] = "base"
    """`base`: the base model's own chat template. `llama2`: <s>[INST] question [/INST] answer </s>."""
    system: str | None = None
    loss_on: Literal["all", "completion"] = "completion"


class Lora(Section):
    r: int = Field(64, ge=1)
    lora_alpha: float = Field(16, gt=0)
    lora_dropout: float = Field(0.1, ge=0, lt=1)
    target_modules: Literal["all-linear"] | list[str] = ["q_proj", "v_proj"]
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead of lora_alpha / r (arXiv:2312.03732)."""


class Training(Section):
    per_device_train_batch_size: int = Field(2, ge=1)
    gradient_accumulation_steps: int = Field(2, ge=1)
    max_steps: int = Field(100, ge=1)
    num_train_epochs: float | None = Field(None, gt=0)
    """Passes over the training rows, in place of max_steps."""
    learning_rate: float = Field(2e-4, gt=0)
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    optim: Literal[
        "auto", "adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"
    ] = "adamw_torch_fused"
    """`auto`: adamw_torch_fused where memory allows it, else adamw_8bit, else paged_adamw_8bit."""
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """Recompute activations in the backward pass: less memory, up to a third more work, the same numbers.
    `auto`: as little of it as fits a GPU's memory; none on a CPU and on the plain engine."""
    fp8: bool = False
    """Products of the frozen weights in row-wise FP8: faster, with activations and gradients rounded to 3 bits of
    mantissa on the way. Needs the packed engine and a GPU of compute capability 8.9 or higher."""
    max_memory: float | None = Field(None, gt=0)
    """GiB of the GPU that a run is planned for; all that is free by default."""
    cuda_graphs: bool = True
    """Replay short rows on a GPU from captured launches, where memory is left for it."""
    engine: Literal["auto", "packed", "plain"] = "auto"
    """`packed`: each optimizer step is one row without padding, through medlora's own compute path.
    `plain`: TRL's padded micro-batches. `auto`: packed wherever the base allows it."""
    logging_steps: int = Field(10, ge=1)
    save_steps: int | None = Field(None, ge=1)
    """Keep a checkpoint every so many steps; none by default. An interrupted run always leaves one."""
    eval_steps: int | None = Field(None, ge=1)
    """Measure the held-out loss every so many steps too, and after the last."""
    load_best_model_at_end: bool = False
    """Keep the adapter of the lowest of those losses rather than the last one."""
    seed: int = 42
    tensorboard: bool = False

    @model_validator(mode="after")
    def _best_of_some(self) -> Self:
        if self.load_best_model_at_end and self.eval_steps is None:
            raise ValueError("load_best_model_at_end needs eval_steps, the steps at which it is measured")
        return self

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.num_train_epochs is not None and "max_steps" in self.model_fields_set:
            raise ValueError("give max_steps or num_train_epochs, not both")
        return self

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        if self.num_train_epochs is None and self.warmup_steps >= self.max_steps:
            raise ValueError(
                f"warmup_steps ({self.warmup_steps}) must be below max_steps ({self.max_steps}); for a short run set "
                "training.warmup_steps=0"
            )
        return self

    @model_validator(mode="after")
    def _fp8_is_packed(self) -> Self:
        if self.fp8 and self.engine == "plain":
            raise ValueError("fp8 needs the packed engine; set engine: auto, or fp8: false")
        return self

    @property
    def samples(self) -> int:
        """Rows of an optimizer step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def steps_an_epoch(self, rows: int) -> int:
        """As Transformers counts them: the last is of fewer rows."""
        return math.ceil(rows / self.samples)


class Evaluation(Section):
    before_and_after: bool = True
    """Measure held-out loss and perplexity on both sides of the training."""
    max_rows: int | None = Field(None, ge=1)


class Generation(Section):
    prompts: list[str] = ["Please tell me about Ascariasis"]
    """Asked of the untuned and of the tuned model when training ends."""
    max_new_tokens: int = Field(300, ge=1)
    max_length: int | None = Field(None, ge=1)
    """Tokens of prompt and answer together; where set it bounds max_new_tokens."""
    temperature: float = Field(0.0, ge=0)
    """0 decodes greedily."""
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    repetition_penalty: float = Field(1.0, ge=1)


class Recipe(Section):
    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    base: Base = Base()
    data: Data = Data()
    prompt: Prompt = Prompt()
    lora: Lora = Lora()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    generation: Generation = Generation()

    def over(self, rows: int) -> "Recipe":
        """With the steps that num_train_epochs takes over so many training rows.

        Raises:
            RecipeError: warm-up would take all of them.
        """
        training = self.training
        if training.num_train_epochs is None:
            return self
        steps = math.ceil(training.num_train_epochs * training.steps_an_epoch(rows))
        lasting = training.model_dump() | {"max_steps": steps, "num_train_epochs": None}
        try:
            return self.model_copy(update={"training": Training.model_validate(lasting)})
        except ValidationError as error:
            raise RecipeError(f"training: {error.errors()[0]['ctx']['error']}") from None

    def to_yaml(self) -> str:
        tree = self.model_dump()
        if self.training.num_train_epochs is not None:
            del tree["training"]["max_steps"]
        return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100)


class _Loader(yaml.SafeLoader):
    """YAML 1.2 numbers (`2e-4` is a float) and no silent second key."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"`{key.value}` is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


EITHER = {"max_steps": "num_train_epochs", "num_train_epochs": "max_steps"}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `section.field=value` overrides.

    Raises:
        RecipeError: unreadable file, YAML that does not parse, or a field that is unknown, of the wrong type or
            out of range.
    """
    file = find_recipe(path)
    try:
        source = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file}: not UTF-8 text at byte {error.start}; save the recipe as UTF-8") from None
    root, tree = _parse(source, str(file))
    for override in overrides:  # of what goes one without the other, the file's gives way
        section, _, name = override.partition("=")[0].strip().rpartition(".")
        if name in EITHER and isinstance(tree.get(section), dict):
            tree[section].pop(EITHER[name], None)
    for override in overrides:
        _apply(tree, override)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(_explain(error, str(file), root, overrides)) from None


def find_recipe(path: str | Path) -> Path:
    """A file, or the name of a recipe that is shipped with the package.

    Raises:
        RecipeError: neither exists.
    """
    file = Path(path)
    if file.is_file():
        return file
    shipped = {recipe.stem: recipe for recipe in shipped_recipes()}
    if str(path) in shipped:
        return shipped[str(path)]
    names = ", ".join(shipped)
    raise RecipeError(f"{path}: no such recipe file{_did_you_mean(file.stem, list(shipped))}; shipped: {names}")


def shipped_recipes() -> list[Path]:
    """The recipes of the source tree, or of the installed package, by name."""
    here = Path(__file__).parent
    folder = next((f for f in (here / "recipes", here.parents[1] / "recipes") if f.is_dir()), None)
    return sorted(folder.glob("*.yaml")) if folder else []


def _parse(source: str, name: str) -> tuple[yaml.Node | None, dict[str, Any]]:
    loader = _Loader(source)
    try:
        node = loader.get_single_node()
        tree = loader.construct_document(node) if node else {}
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        text = source.splitlines()[line - 1] if line <= len(source.splitlines()) else ""
        why = "a tab; YAML indents with spaces" if "\t" in text else error.problem or "not valid YAML"
        raise RecipeError(f"{name}, line {line}: {why}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{name}: not valid YAML: {error}") from None
    finally:
        loader.dispose()
    if not isinstance(tree, dict):
        raise RecipeError(f"{name}: a recipe is a mapping of sections ({', '.join(Recipe.model_fields)})")
    return node, tree


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"--set {override}: write it as section.field=value")
    try:
        value = yaml.load(text, _Loader)  # a SafeLoader subclass
    except yaml.YAMLError:
        raise RecipeError(f"--set {override}: `{text}` is not a valid YAML value") from None
    *sections, field = key.strip().split(".")
    for name in sections:
        below = tree.setdefault(name, {})
        if not isinstance(below, dict):
            raise RecipeError(f"--set {override}: `{name}` is not a section")
        tree = below
    tree[field] = value


def _explain(error: ValidationError, file: str, root: yaml.Node | None, overrides: Sequence[str]) -> str:
    problems = error.errors()
    first = problems[0]
    path = [str(part) for part in first["loc"] if part not in ("list[str]", "literal['all-linear']")]
    line = _line_of(root, path)
    where = f"{file}, line {line}" if line else file
    where = next((f"--set {o}" for o in overrides if o.split("=")[0].strip() == ".".join(path)), where)
    more = len({str(problem["loc"][:2]) for problem in problems}) - 1
    also = f" ({more} more such error{'s' * (more > 1)})" if more else ""
    return f"{where}: {'.'.join(path) or 'recipe'}: {_reason(dict(first), path)}{also}"


def _reason(problem: dict[str, Any], path: list[str]) -> str:
    value, kind = problem["input"], problem["type"]
    if kind == "extra_forbidden":
        allowed = list(_fields_of(path[:-1]))
        return f"unknown field{_did_you_mean(path[-1], allowed)}; allowed: {', '.join(allowed)}"
    if path[-1:] == ["target_modules"]:
        return f"must be `all-linear` or a list of module names such as [q_proj, v_proj]; {value!r} given"
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", problem["ctx"]["expected"])
        return f"{value!r} is not allowed; choose from {', '.join(allowed)}{_did_you_mean(str(value), allowed)}"
    if kind == "value_error":
        return str(problem["ctx"]["error"])
    if kind == "model_type":
        return f"must be a section with fields of its own; {value!r} given"
    given = "" if isinstance(value, dict) else f"; {value!r} given"
    message: str = problem["msg"].replace("Input should", "must")
    return re.sub("be a valid ([aeiou]?)", lambda found: f"be a{'n' * bool(found[1])} {found[1]}", message) + given


def _did_you_mean(word: str, allowed: list[str]) -> str:
    close = difflib.get_close_matches(word, allowed, n=1)
    return f" (did you mean `{close[0]}`?)" if close else ""


def _fields_of(path: list[str]) -> Iterator[str]:
    model: type[BaseModel] = Recipe
    for part in path:
        model = model.model_fields[part].annotation  # type: ignore[assignment]
    yield from model.model_fields


def _line_of(node: yaml.Node | None, path: list[str]) -> int | None:
    line = None
    for part in path:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        match = next(((key, value) for key, value in pairs if key.value == part), None)
        if match is None:
            return None if line is None else line
        line, node = match[0].start_mark.line + 1, match[1]
    return line
