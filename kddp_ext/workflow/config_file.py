"""Settings in a file: JSON, as every run writes it, or TOML or YAML, as people write them."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kddp_ext.files import parse_json
from kddp_ext.workflow.config import CONFIG_VERSION, RunConfig, SweepConfig, flattened
from kddp_ext.workflow.errors import WorkflowError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_LISTS = {"seeds", "widths", "l1_weights", "retrain", "ablations"}  # of a sweep; all other settings are those of a run


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a file, nested as in config.json and with its names; those of the run are under "run".

    Keys may be nested or dotted, with dashes or underscores: `student.l1-weight`.

    Raises:
        WorkflowError: there is no such file, or it does not hold settings; the message names it.
    """
    if path.suffix not in (".json", ".toml", ".yaml", ".yml"):
        raise WorkflowError(f"--config: expected a .json, .toml or .yaml file, got {path}")
    try:
        text = path.read_text(encoding="utf-8")
        values = _parse(text, path.suffix)
    except (OSError, ValueError) as error:  # TOML's and YAML's errors are ValueErrors, or made ones
        reason = " ".join(str(error.strerror if isinstance(error, OSError) else error).split())
        raise WorkflowError(f"--config: {path} cannot be read: {reason}") from error
    if not isinstance(values, dict):
        raise WorkflowError(f"--config: expected settings by name in {path}, got a {type(values).__name__}")
    if values.pop("version", CONFIG_VERSION) != CONFIG_VERSION:
        raise WorkflowError(f"--config: {path} was written by another version of kddp_ext")
    settings: dict[str, Any] = {"run": {}}
    for key, value in flattened(values).items():
        name = key.removeprefix("run.")
        section, *names = [name] if name in _LISTS else ["run", *name.split(".")]
        place = settings
        for each in names:
            place, section = place.setdefault(section, {}), each
        place[section] = value
    return settings


def _parse(text: str, suffix: str) -> Any:
    if suffix == ".json":
        return parse_json(text)
    if suffix == ".toml":
        return tomllib.loads(text)
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise WorkflowError("YAML needs PyYAML (pip install pyyaml); TOML and JSON need nothing") from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def sweep_with_settings(config: SweepConfig, settings: dict[str, Any], path: Path) -> SweepConfig:
    """`config` with what `read_settings` read from `path`; raises WorkflowError naming what is unknown or wrong."""
    try:
        return SweepConfig.from_json({"version": CONFIG_VERSION, **_merged(asdict(config), settings)})
    except WorkflowError as error:
        raise WorkflowError(f"{path}: {error}") from error


def run_with_settings(config: RunConfig, settings: dict[str, Any], path: Path) -> RunConfig:
    """The same for a run, which takes the settings of another run's config.json, but not those of a sweep's."""
    sweep = sweep_with_settings(SweepConfig.single(config), settings, path)
    if settings.keys() & _LISTS and sweep != SweepConfig.single(sweep.run):
        raise WorkflowError(f"{path}: it holds the settings of a sweep; use kddp sweep --config {path}")
    return sweep.run


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in changes.items():
        inner = base.get(key)
        result[key] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return result
