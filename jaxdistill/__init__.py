"""Distil a diffusion model into a student that needs one to three network calls, in JAX.

`import jaxdistill as jd` brings the names of `__all__`. Each is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from jaxdistill.errors import UserError as UserError
    from jaxdistill.methods import METHODS as METHODS
    from jaxdistill.methods.add import add as add
    from jaxdistill.methods.denoising import denoising as denoising
    from jaxdistill.methods.direct import direct as direct
    from jaxdistill.methods.dmd2 import dmd2 as dmd2
    from jaxdistill.methods.endpoint import endpoint as endpoint
    from jaxdistill.methods.imagine_flash import Reconstruction as Reconstruction
    from jaxdistill.methods.imagine_flash import imagine_flash as imagine_flash
    from jaxdistill.methods.imagine_flash import table_shift as table_shift
    from jaxdistill.methods.lcm import consistency_distillation as consistency_distillation
    from jaxdistill.methods.lightning import lightning as lightning
    from jaxdistill.methods.step_distillation import step_distillation as step_distillation
    from jaxdistill.methods.tdm import tdm as tdm
    from jaxdistill.model import Model as Model
    from jaxdistill.prediction import eps_prediction as eps_prediction
    from jaxdistill.prediction import flow_prediction as flow_prediction
    from jaxdistill.prediction import v_prediction as v_prediction
    from jaxdistill.prediction import v_target as v_target
    from jaxdistill.prediction import x0_prediction as x0_prediction
    from jaxdistill.sampling import ddim as ddim
    from jaxdistill.sampling import dpm_solver_pp_2m as dpm_solver_pp_2m
    from jaxdistill.sampling import guidance as guidance
    from jaxdistill.sampling import noise_correction as noise_correction
    from jaxdistill.sampling import rollout as rollout
    from jaxdistill.sampling import start as start
    from jaxdistill.sampling import trailing_grid as trailing_grid
    from jaxdistill.schedule import NoiseSchedule as NoiseSchedule
    from jaxdistill.schedule import cosine as cosine
    from jaxdistill.schedule import ddpm as ddpm
    from jaxdistill.schedule import flow as flow
    from jaxdistill.schedule import scaled_linear_betas as scaled_linear_betas
    from jaxdistill.tasks.own_model.distill import Distilled as Distilled
    from jaxdistill.tasks.own_model.distill import distill as distill
    from jaxdistill.tasks.own_model.problem import Options as Options
    from jaxdistill.tasks.own_model.problem import Problem as Problem
    from jaxdistill.train import Objective as Objective
    from jaxdistill.train import TrainState as TrainState
    from jaxdistill.train import init_state as init_state
    from jaxdistill.train import train_step as train_step

_NAMES = {
    "errors": "UserError",
    "methods": "METHODS",
    "methods.add": "add",
    "methods.denoising": "denoising",
    "methods.direct": "direct",
    "methods.dmd2": "dmd2",
    "methods.endpoint": "endpoint",
    "methods.imagine_flash": "Reconstruction imagine_flash table_shift",
    "methods.lcm": "consistency_distillation",
    "methods.lightning": "lightning",
    "methods.step_distillation": "step_distillation",
    "methods.tdm": "tdm",
    "model": "Model",
    "prediction": "eps_prediction flow_prediction v_prediction v_target x0_prediction",
    "sampling": "ddim dpm_solver_pp_2m guidance noise_correction rollout start trailing_grid",
    "schedule": "NoiseSchedule cosine ddpm flow scaled_linear_betas",
    "tasks.own_model.distill": "Distilled distill",
    "tasks.own_model.problem": "Options Problem",
    "train": "Objective TrainState init_state train_step",
}
"""Module -> its public names, as in the imports above, which type checkers read."""

_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    """A public name, imported now."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, and what has been imported."""
    return sorted({*globals(), *__all__})
