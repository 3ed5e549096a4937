"""What a text-to-image run prepares and draws, on several devices and in several processes."""

import json

import folders
import numpy as np
import pytest
from PIL import Image
from test_distributed import begin, finish, free_port

PREPARE = """
import json, shutil, sys
from pathlib import Path
import jax
import numpy as np
import text_config
from jaxdistill.tasks.text_to_image import pipeline
from jaxdistill.tasks.text_to_image.task import TextToImageTask
from jaxdistill.run import distributed, loop
from jaxdistill.run.run import Run
workdir, changes = Path(sys.argv[1]), json.loads(sys.argv[2])
if len(sys.argv) > 3:
    distributed.start(sys.argv[3], 2, int(sys.argv[4]), timeout=60)
found = {}
for name, more in changes.items():
    config = text_config.get_config()
    config.update_from_flattened_dict(more)
    # One job has a folder that all see, the other one of each process.
    folder = workdir / (name if name == "drawn" else f"{name}-{jax.process_index()}")
    task = TextToImageTask(config)
    folder.mkdir(parents=True, exist_ok=True)
    assert distributed.share_folder(folder) == (name == "drawn" or jax.process_count() == 1)
    with loop.StopSignal().installed() as stop:
        run = Run(config, folder, stop, task.layout)
        pipe = task.teacher_pipe(task.load("float32"))
        asked, encode = [], pipe.text
        call = type(encode).__call__
        def asking(self, prompts, **options):
            asked.extend(prompts)
            return call(self, prompts, **options)
        type(encode).__call__ = asking
        try:
            task.open_data(run, pipe)
        finally:
            type(encode).__call__ = call
        if jax.process_index() and name == "read":  # a machine that was replaced
            shutil.rmtree(folder / "cache")
        task.open_data(run, pipe)
    devices = {d for leaf in jax.tree.leaves(pipe.params) for d in leaf.devices()}
    assert devices == set(jax.local_devices()), devices
    for kind, cache in task._caches.items():
        for i in range(len(cache)):
            found |= {f"{name}/{kind}/{i}/{field}": value for field, value in cache[i].items()}
    found[f"{name}/asked"] = np.array([p for p in asked if p])
alone = jax.process_count() == 1
pipe = pipeline.load(config.teacher.folder, layout=pipeline.every_device() if alone else None)
assert {len(leaf.devices()) for leaf in jax.tree.leaves(pipe.params)} == {4 if alone else 1}
found["drawn/loaded"] = pipe(task.prompts[:3], steps=2, guidance=2.0, batch_size=1, seed=3)
np.savez(workdir / f"found-{jax.process_index()}.npz", **found)
"""


@pytest.mark.long
def test_two_processes_prepare_what_one_does_each_its_part(tmp_path):
    """1 x 4 devices against 2 x 2, the teacher whole and divided by two: the same records and
    images, and half of the work each.
    """
    (tmp_path / "images").mkdir()
    names = [f"{i}.png" for i in range(5)]
    for i, name in enumerate(names):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (64, 64, 3), np.uint8)).save(
            tmp_path / "images" / name
        )
    lines = [json.dumps({"file_name": name, "prompt": f"photo of {name}"}) for name in names]
    (tmp_path / "images" / "metadata.jsonl").write_text("\n".join(lines))
    (tmp_path / "prompts.txt").write_text("".join(f"a cat {i}\n" for i in range(21)))
    given = {
        "teacher.folder": str(folders.folder("sd")),
        "data.prompts": str(tmp_path / "prompts.txt"),
    }
    given |= {"student.batch_size": 8, "log.batch_size": 1}
    changes = {
        "drawn": {**given, "adversarial.pool": 11},
        "read": {
            **given,
            "adversarial.reals": "data",
            "data.images": str(tmp_path / "images"),
            "mesh.fsdp": 2,
            "mesh.smallest": 64,
        },
    }
    found = {}
    for count in (1, 2):
        workdir, coordinator = tmp_path / f"run-{count}", f"127.0.0.1:{free_port()}"
        joined = [(coordinator, i) if count == 2 else () for i in range(count)]
        command = ("-c", PREPARE, workdir, json.dumps(changes))
        finish(
            workdir,
            [begin(workdir, i, 4 // count, *command, *more) for i, more in enumerate(joined)],
            {0},
        )
        found[count] = [np.load(workdir / f"found-{i}.npz") for i in range(count)]
    (expected,) = found[1]
    assert sum(name.endswith("latents") for name in expected.files) == 11 + 5
    for part in found[2]:
        assert part.files == expected.files
        for name in part.files:
            if "/prompts/" in name:
                np.testing.assert_array_equal(part[name], expected[name], err_msg=name)
            elif not name.endswith("/asked"):  # programs for two devices: captions are in float16
                np.testing.assert_allclose(
                    part[name], expected[name], rtol=2e-3, atol=1e-4, err_msg=name
                )
    for job in changes:
        asked, both = expected[f"{job}/asked"], [part[f"{job}/asked"] for part in found[2]]
        assert all(len(part) <= 0.7 * len(asked) for part in both), [len(part) for part in both]
        assert set(both[0]) | set(both[1]) == set(asked)
