"""Adapters that PEFT makes for a tiny model, and the logits of both together in PyTorch."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from numpy_llama.config import ModelArgs
from numpy_llama.proof.oracle import transformers_model

MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def peft_model(args: ModelArgs, weights: dict[str, np.ndarray], seed: int = 0, **config: Any) -> PeftModel:
    """The model with an adapter of this kind."""
    return adapted(transformers_model(args, weights), seed, **config)


def adapted(base: PreTrainedModel, seed: int = 0, **config: Any) -> PeftModel:
    """The model with an adapter whose A and B are random: each update is about half of its weight."""
    torch.manual_seed(seed)
    options = {"target_modules": MATRICES, "task_type": "CAUSAL_LM"} | config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tied weights, no task
        model = get_peft_model(base, LoraConfig(**options)).eval()
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "lora_" in name:
                x.normal_(std=0.5 * x.shape[-1] ** -0.5 if "_A" in name else 0.5)
    return model


def write(model: PeftModel, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the embedding is saved too
        model.save_pretrained(folder)
    return folder


def read(args: ModelArgs, weights: dict[str, np.ndarray], folder: Path) -> PeftModel:
    """The model with an adapter from a folder, loaded by PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("error", UserWarning)  # a tensor that is missing or unknown
        return PeftModel.from_pretrained(transformers_model(args, weights), folder).eval()


def logits(model: PeftModel, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.numpy()
