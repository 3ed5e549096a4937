"""Variants that several configs share: a config for a config file's get_config("one")."""

from ml_collections import ConfigDict


def chosen(config: ConfigDict, name: str, *, file: str) -> ConfigDict:
    """The config, or with name "one" the one of a student of one step that learns where a finished
    one of several steps ends.

    Raises ValueError for another name. The finished student takes the teacher's place:
    --config.teacher.path=runs/digits/student, or --config.teacher.folder=runs/sd15/diffusers.
    """
    if not name:
        return config
    if name != "one":
        raise ValueError(
            f"configs/{file}.py:{name} is not known; use one of configs/{file}.py,"
            f" configs/{file}.py:one"
        )
    config.method.name = "endpoint"
    config.teacher.steps = max(config.student.steps)
    config.teacher.guidance = 1.0  # a student has it built in
    config.student.steps = (1,)
    config.student.decay_to = 0.02  # its target stands still
    config.adversarial.weight = 0.0
    if "grid" in config.teacher:
        config.teacher.grid = config.student.grid
        config.log.teacher_steps = config.teacher.steps
    if "eval" in config:
        config.eval.guidances = ()
    return config
