"""From a TOML file and `--set` overrides to a Config, or to one ValueError that lists every problem.

    text -> tables -> overrides applied -> sections validated field by field -> data and every_steps resolved -> checks

Fields are validated one by one, so that a wrong one hides neither the others' problems nor those of the layout.
"""

import difflib
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError

from k2_megatron.config.checks import problems_of
from k2_megatron.config.problems import Problem, raise_problems
from k2_megatron.config.schema import SECTIONS, Section
from k2_megatron.config.toml_text import tomllib
from k2_megatron.config.tree import Config

KEYS = [f"{name}.{key}" for name, section in SECTIONS.items() for key in section.model_fields]


def load_run_config(path: str | Path) -> Config:
    """The resolved configuration of a run as it stands in its folder, with what the run went through (train.history).

    Raises ValueError as `load_config` does.
    """
    return _config(str(path), _read(Path(path)), [], None)


def load_config(path: str | Path, overrides: Sequence[str] = (), world_size: int | None = None) -> Config:
    """Read the run's TOML file, apply `section.key=value` overrides in their order, and check everything.

    An override's value is read as TOML, or taken as text where it is none (`run.folder=runs/a`); an empty value
    removes the key, so that its default holds. `world_size` is the number of ranks that torchrun or srun started:
    parallel.data is then derived from it, whatever the file says. Paths in the result are as written: relative ones
    are relative to the current directory. What a run went through (train.history) is not taken from here: a start takes
    it from the checkpoint it goes on from.

    Raises ValueError with all problems at once (file unreadable, unknown key, wrong type, layout that does not fit).
    """
    tables = _read(Path(path))
    if isinstance(tables.get("train"), dict):
        tables["train"].pop("history", None)
    return config_of_tables(str(path), tables, overrides, world_size)


def config_of_tables(
    source: str, tables: dict[str, Any], overrides: Sequence[str] = (), world_size: int | None = None
) -> Config:
    """The same of tables that were read already, and are changed here; `source` names them in errors."""
    problems: list[Problem] = []
    for override in overrides:
        problems.extend(_apply(tables, override))
    return _config(source, tables, problems, world_size)


def _config(path: str, tables: dict[str, Any], problems: list[Problem], world_size: int | None) -> Config:
    problems.extend(_unknown_sections(tables))
    sections: dict[str, Any] = {}
    for name in SECTIONS:
        sections[name], found = _validate(name, tables.get(name, {}))
        problems.extend(found)
    problems.extend(_resolve_data(sections, world_size))
    problems.extend(_resolve_every_steps(sections))
    problems.extend(problems_of(SimpleNamespace(**sections, incomplete=bool(problems))))
    raise_problems(path, problems)
    return Config(**sections)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read as a configuration: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is not TOML: {error}") from error


def _apply(tables: dict[str, Any], override: str) -> list[Problem]:
    """Put one `section.key=value` into the tables, or take the key out."""
    dotted, equals, text = (part.strip() for part in override.partition("="))
    *folders, key = dotted.split(".")
    if not equals or not folders or not all([*folders, key]):
        return [Problem("--set", override, "must read section.key=value, as in --set train.steps=100")]
    if dotted == "train.history":
        return [Problem("--set", override, "is what the run itself writes; set train.global_batch or sequence_length")]
    table = tables
    for folder in folders:
        table = table.setdefault(folder, {})
        if not isinstance(table, dict):
            return [Problem("--set", override, f"{folder} is a value, not a table: set it as a whole")]
    if not text:
        table.pop(key, None)
        return []
    try:
        table[key] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        table[key] = text
    return []


def _unknown_sections(tables: dict[str, Any]) -> list[Problem]:
    return [
        Problem(name, value, f"is no section; {_near(name, SECTIONS) or 'known are ' + ', '.join(SECTIONS)}")
        for name, value in tables.items()
        if name not in SECTIONS
    ]


def _near(word: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.7)
    return f"did you mean {matches[0]}?" if matches else ""


def _validate(name: str, table: Any) -> tuple[Any, list[Problem]]:
    """The section and its problems. With problems, it is a namespace that lacks the fields that have them."""
    kind = SECTIONS[name]
    if not isinstance(table, dict):
        return SimpleNamespace(model_fields_set=set()), [Problem(name, table, f"must be a table: [{name}]")]
    try:
        return kind.model_validate(table), []
    except ValidationError as error:
        problems = [_problem(name, kind, details) for details in error.errors()]
        bad = {details["loc"][0] for details in error.errors()}
    good: dict[str, Any] = {}
    for key, field in kind.model_fields.items():
        if key in table and key not in bad:
            kind_of_value: Any = Annotated[(field.annotation, field)]
            good[key] = TypeAdapter(kind_of_value).validate_python(table[key], strict=True)
        elif key not in bad:
            good[key] = field.get_default(call_default_factory=True)
    return SimpleNamespace(**good, model_fields_set=set(table) - bad), problems


def _problem(name: str, kind: type[Section], details: Any) -> Problem:
    """One of pydantic's findings in our words, with the meaning of the field it is about."""
    location = [part for part in details["loc"] if isinstance(part, str)]  # a number is a place in a list
    key, table = ".".join([name, *location]), _table(kind, location)
    if details["type"] == "extra_forbidden":
        return Problem(key, details["input"], f"is no key; {_nearest_key(key, table)}")
    meaning = (table.model_fields[location[-1]].description or "").split("\n")[0]
    if details["type"] == "missing":
        return Problem(key, None, f"is missing. {meaning}")
    wanted = details["msg"].removeprefix("Input ")
    if details["type"] == "model_type":
        wanted = "should be a table"
    quote = "; quote it to make it text" if details["type"] == "string_type" else ""
    return Problem(key, details["input"], f"{wanted}{quote}. {meaning}")


def _table(kind: type[BaseModel], location: Sequence[str]) -> type[BaseModel]:
    """The table that holds the last key of a location such as ["batch_ramp", "start"]."""
    if len(location) == 1:
        return kind
    annotation = kind.model_fields[location[0]].annotation
    within = [annotation, *get_args(annotation)]
    candidates = [*within, *(part for outer in within for part in get_args(outer))]
    tables = (part for part in candidates if isinstance(part, type) and get_origin(part) is None)
    return _table(next(part for part in tables if issubclass(part, BaseModel)), location[1:])


def _nearest_key(key: str, table: type[BaseModel]) -> str:
    """What an unknown dotted key was meant to be: the same word in another section, a near one, or the choice."""
    prefix, word = key.rsplit(".", 1)
    same = [known for known in KEYS if known.split(".")[-1] == word]
    if same:
        return f"did you mean {' or '.join(same)}?"
    return _near(word, table.model_fields) or f"known in {prefix} are {', '.join(table.model_fields)}"


def _resolve_data(sections: dict[str, Any], world_size: int | None) -> Iterator[Problem]:
    """parallel.data from the ranks that run, or else from parallel.ranks; parallel.ranks is done with then."""
    parallel = sections["parallel"]
    ranks, source = getattr(parallel, "ranks", None), "parallel.ranks"
    if world_size is not None:
        ranks, source = world_size, "ranks started"
    elif ranks is not None and "data" in parallel.model_fields_set:
        yield Problem(
            "parallel.ranks", ranks, f"says again what parallel.data = {parallel.data} says: give one of them"
        )
        return
    cuts: list[Any] = [getattr(parallel, key, None) for key in ("tensor", "pipeline", "context")]
    if ranks is None or None in cuts:
        return
    model_parallel = math.prod(cuts)
    if ranks % model_parallel or ranks <= 0:
        product = "parallel.tensor * pipeline * context = " + " * ".join(map(str, cuts))
        yield Problem(source, ranks, f"must be a multiple of {product} = {model_parallel}")
        return
    sections["parallel"] = _replace(parallel, data=ranks // model_parallel, ranks=None)


def _resolve_every_steps(sections: dict[str, Any]) -> Iterator[Problem]:
    """checkpoint.every_steps from checkpoint.chunks, which is done with then."""
    checkpoint, steps = sections["checkpoint"], getattr(sections["train"], "steps", None)
    chunks = getattr(checkpoint, "chunks", None)
    if chunks is None or steps is None:
        return
    if "every_steps" in checkpoint.model_fields_set:
        every = checkpoint.every_steps
        yield Problem("checkpoint.chunks", chunks, f"says again what every_steps = {every} says: give one of them")
    elif steps % chunks:
        yield Problem("checkpoint.chunks", chunks, f"must divide train.steps = {steps} into equal chunks")
    else:
        sections["checkpoint"] = _replace(checkpoint, every_steps=steps // chunks, chunks=None)


def _replace(section: Any, **values: Any) -> Any:
    if isinstance(section, Section):
        return section.model_copy(update=values)
    return SimpleNamespace(**{**vars(section), **values})
