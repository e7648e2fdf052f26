"""List names that are not keys, and what to write instead."""

from __future__ import annotations

# Keys and values of earlier versions.
REMOVED = {
    "sweep.stack": "runs go side by side with launcher=local launcher.n_jobs=2",
    "hardware.strategy=fsdp": "hardware.strategy=ddp splits the batch over the devices",
    "hardware.allocator": "freed memory is always kept for the next step",
    "hardware.matmul": "TINYGPT_MATMUL=torch in the environment switches oneDNN off",
    **dict.fromkeys(
        [f"hardware.compile={how}" for how in ("regional", "whole", "graphs")],
        "hardware.compile=on compiles the whole model",
    ),
    "policy=table": "policy=self draws each choice from the model's own logits",
    "outer.shared": "the base that adapts is always the run itself",
    "tuning.directives": "tuning.learning_rates= lists what is tried on the tune documents",
    **dict.fromkeys(
        ["methods=uniform_directive", "methods=fixed_best_directive"],
        "methods=[lora_doc,restem] compares the document with learned directives",
    ),
    "estimator=absolute": "estimator=likelihood comes to the same law",
    "threshold_unit": "threshold= is in units of the noise",
}
# Flags of Lightning's Trainer and folders of Hydra that other keys decide.
DECIDED = {
    "trainer.max_steps": "train.steps",
    "trainer.max_epochs": "train.epochs",
    "trainer.accumulate_grad_batches": "hardware.micro_batch_size",
    "trainer.precision": "train.precision",
    "trainer.gradient_clip_val": "train.grad_clip_norm",
    "trainer.log_every_n_steps": "train.log_every",
    "trainer.val_check_interval": "train.eval_every",
    "trainer.logger": "logger",
    "trainer.callbacks": "+callbacks.NAME._target_",
    **{
        f"trainer.{name}": f"hardware.{name}"
        for name in ("accelerator", "devices", "num_nodes", "strategy")
    },
    "model.rope_scaling": "init_from",
    "hydra.run.dir": "output_dir, study and run_name",
    "hydra.sweep.dir": "output_dir and study",
    "hydra.sweep.subdir": "run_name",
    "hydra.output_subdir": "run_name, whose folder keeps config.yaml",
    "hydra.job.chdir": "the shell: commands stay in the folder where they are started",
}
# What other programs call a key; {} is its value.
SYNONYMS = {
    "data=custom data.path={}": "path file text",
    "optim.learning_rate={}": "lr learning_rate max_lr peak_lr",
    "optim.weight_decay={}": "wd weight_decay",
    "model.d_model={}": "n_embd embed_dim hidden_size dim",
    "model.n_layers={}": "n_layer num_layers num_hidden_layers layers",
    "model.n_heads={}": "n_head num_heads num_attention_heads",
    "model.max_seq_len={}": "block_size context_length context_size seq_len max_length",
    "model.dropout={}": "dropout",
    "tokenizer.vocab_size={}": "vocab_size",
    "train.steps={}": "max_steps max_iters num_steps iterations iters steps",
    "train.epochs={}": "epochs max_epochs num_epochs num_train_epochs",
    "train.batch_tokens={}*L with L=model.max_seq_len, as it counts tokens": (
        "batch_size per_device_train_batch_size train_batch_size"
    ),
    "hardware.micro_batch_size=B/{} with B the sequences of train.batch_tokens": (
        "accumulate_grad_batches gradient_accumulation_steps grad_accum_steps"
    ),
    "hardware={}": "device accelerator",
    "train.grad_clip_norm={}": "grad_clip gradient_clip_val max_grad_norm",
    "schedule.warmup_steps={}": "warmup warmup_iters warmup_steps",
}
DEVICES = {"gpu": "cuda", "nvidia": "cuda", "cuda:0": "cuda", "metal": "mps"}
# Choices of Hydra's own plugins and of other programs.
OTHER_CHOICES = {
    **{f"hardware={word}": f"hardware={ours}" for word, ours in DEVICES.items()},
    "hydra/launcher=joblib": "launcher=local",
    "hydra/launcher=submitit_local": "launcher=local",
    "hydra/launcher=submitit_slurm": "launcher=slurm",
    "hydra/launcher=ray": "launcher=ray",
}
