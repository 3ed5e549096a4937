"""Distillation methods, one file each; a method is a loss: (params, teacher_params, batch, key) ->
(loss, metrics).
"""
