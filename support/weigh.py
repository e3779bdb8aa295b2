"""python model.py: what a configuration weighs, and the way of a checkpoint to transformers."""
import os
from dataclasses import dataclass

import torch

from support import budget, hf, rules
from support.tokenizer import get_tokenizer
from support.usage import one_line


@dataclass
class ExportConfig:
    export: str | None = None  # with --out_dir: write that checkpoint as a folder for transformers


def main(doc):
    from configurator import parse
    from model import GPT, ModelConfig, load_checkpoint
    from train import TrainConfig  # config files have its keys, too
    parsed = parse(ModelConfig, TrainConfig, ExportConfig, words=("config",), doc=doc)
    folder, target = parsed.given.get("out_dir"), parsed.make(ExportConfig).export
    with one_line():
        budget.check_size(parsed.given)
        rules.check([(target != "", "--export is empty: name a folder to write")])
        if parsed.words["config"] or not folder:
            rules.check([(target is None, "--export writes a trained model: name its folder with "
                          "--out_dir, and no config file")])
            config = parsed.make(ModelConfig)
        else:
            saved = load_checkpoint(os.path.join(folder, "ckpt.pt"))
            config = ModelConfig(**saved["model_config"])
        with torch.device("meta"):
            budget.print_parameters(GPT(config), config.n_active_params())
        if target:
            hf.export(GPT.from_checkpoint(folder), target, get_tokenizer(saved["tokenizer"]))
            print(f'wrote {target}: AutoModelForCausalLM.from_pretrained("{target}")')
