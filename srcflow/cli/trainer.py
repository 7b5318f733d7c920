"""`srcflow fit`, `validate`, `test` and `predict`: LightningCLI over the tasks."""

from __future__ import annotations

import warnings
from types import MappingProxyType
from typing import Any

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from srcflow.callbacks import checkpoint_files
from srcflow.cli import TRAINER_COMMANDS, load_parts, sources, trainer_options
from srcflow.cli.parser import Parser
from srcflow.cli.run_directory import RunRecord, RunTrainer
from srcflow.errors import ConfigError, SrcflowError
from srcflow.tasks.base import Task
from srcflow.tasks.strategies import check_name


def run_trainer() -> None:
    """LightningCLI, for any Task and any LightningDataModule; it reads sys.argv."""

    load_parts()
    sources.forget()
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated", category=FutureWarning)  # Lightning 2.6 on torch 2.15

    class TrainerParser(Parser, LightningArgumentParser):
        bases = MappingProxyType({"model": Task, "data": L.LightningDataModule, "trainer": L.Trainer})

    class CheckingCLI(LightningCLI):
        def _parse_ckpt_path(self) -> None:
            """Lightning reads all of the file for hyperparameters, of which tasks store none; see only whether it is one."""
            path = self.config[self.config.subcommand].get("ckpt_path") if self.config.get("subcommand") else None
            if path == "best":
                why = "a start knows no best checkpoint; only a fit in the same process would."
                raise ConfigError("ckpt_path", path, why, "Name the file that your ModelCheckpoint wrote, or write last for the newest.")
            if path is not None and path not in ("last", "hpc") and "://" not in path:
                checkpoint_files.check(path)

        def _set_seed(self) -> None:
            trainer_options.check(self.config[self.config.subcommand].as_dict())
            super()._set_seed()

        def before_instantiate_classes(self) -> None:
            check_name(self.config[self.config.subcommand].trainer.strategy)

        def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[L.Callback]) -> L.Trainer:
            try:
                return super()._instantiate_trainer(config, callbacks)
            except SrcflowError:
                raise
            except Exception as e:  # every kind is raised for a value that does not suit
                raise trainer_options.refused(e, self.config[self.config.subcommand].trainer.as_dict()) from e

    CheckingCLI(
        Task,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        auto_configure_optimizers=False,  # a task owns its optimizers
        load_from_checkpoint_support=False,  # tasks store no hyperparameters, so a checkpoint never overrides what the user asks for
        trainer_class=RunTrainer,
        save_config_callback=RunRecord,
        parser_class=TrainerParser,
        parser_kwargs={"prog": "srcflow", **{k: {"description": v} for k, v in TRAINER_COMMANDS.items()}},
        save_config_kwargs={"overwrite": True},  # resuming into the same folder is ordinary
    )
