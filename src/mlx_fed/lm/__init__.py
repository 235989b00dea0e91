"""Federated fine-tuning of language models with mlx-lm: LoRA, DoRA or whole layers.

A configuration file is mlx-lm's own with one more section, ``federation:``;
:func:`~mlx_fed.lm.lora_task.lora_task` makes an ordinary :class:`~mlx_fed.Task` of it. Nothing
outside
this folder and the command line knows that there are language models.
"""
