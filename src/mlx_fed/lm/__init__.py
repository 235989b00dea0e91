"""Federated fine-tuning of language models with mlx-lm: LoRA, DoRA or full layers.

The configuration file is mlx-lm's, with a section ``federation:``.
:func:`~mlx_fed.lm.lora_task.lora_task` makes a :class:`~mlx_fed.Task` of it. Only this folder and
the command line depend on language models.
"""
