"""Detection of accelerators and the line that installs JAX for them, on faked /proc and /dev."""

import json
from pathlib import Path

import pytest

from jaxllm.cli import accelerators
from jaxllm.cli.accelerators import (
    Accelerator,
    advice,
    detect,
    detect_nvidia,
    detect_tpu,
    install_line,
    requirement,
)

SMI = """
==============NVSMI LOG==============
Driver Version                                         : {driver}
CUDA Version                                           : {cuda}
Attached GPUs                                          : 1
GPU 00000000:00:04.0
    Product Name                                       : Tesla T4
"""
MODULE = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {driver}  Wed Jul  2 10:00:00 UTC 2025\nGCC version: 12.2\n"
OPEN_MODULE = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {driver}  Release Build\n"


def fake_nvidia(root: Path, driver: str = "550.54.15", template: str = MODULE) -> Path:
    """A /proc and /dev as the NVIDIA driver makes them."""
    proc = root / "proc/driver/nvidia"
    card = proc / "gpus/0000:00:04.0"
    card.mkdir(parents=True)
    (proc / "version").write_text(template.format(driver=driver))
    (card / "information").write_text("Model: \t\t Tesla T4\nIRQ:   33\n")
    (root / "dev").mkdir()
    (root / "dev/nvidia0").touch()
    return root


def test_a_machine_without_accelerators(tmp_path):
    assert detect_nvidia(tmp_path, smi="") is None
    assert detect_tpu(tmp_path) is None


@pytest.mark.parametrize("template", [MODULE, OPEN_MODULE])
@pytest.mark.parametrize(
    ("driver", "extra"),
    [("550.54.15", "cuda12"), ("525.60.13", "cuda12"), ("580.65.06", "cuda13"), ("470.82.01", None)],
)
def test_proc_alone_is_enough(tmp_path, driver, extra, template):
    found = detect_nvidia(fake_nvidia(tmp_path, driver, template), smi="")
    assert found == Accelerator("nvidia", ("Tesla T4",), driver)
    assert found.extra == extra


@pytest.mark.parametrize(("cuda", "extra"), [("12.4", "cuda12"), ("13.0", "cuda13"), ("11.8", None)])
def test_nvidia_smi_tells_the_cuda_version(tmp_path, cuda, extra):
    # The driver's own number is not decisive where the tool names the CUDA version.
    found = detect_nvidia(fake_nvidia(tmp_path), smi=SMI.format(driver="550.54.15", cuda=cuda))
    assert found is not None and found.cuda == tuple(map(int, cuda.split(".")))
    assert found.extra == extra
    assert "Tesla T4" in str(found) and f"CUDA {cuda}" in str(found)


def test_a_device_file_alone_counts(tmp_path):
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    found = detect_nvidia(tmp_path, smi="")
    assert found is not None and found.extra == "cuda12" and str(found) == "NVIDIA device"


def test_an_unloaded_driver_is_no_device(tmp_path):
    assert (
        detect_nvidia(tmp_path, smi="NVIDIA-SMI has failed because it couldn't communicate with the driver.")
        is None
    )


def test_tpu_by_device_files(tmp_path):
    (tmp_path / "dev").mkdir()
    for chip in range(4):
        (tmp_path / f"dev/accel{chip}").touch()
    found = detect(tmp_path) if accelerators.shutil.which("nvidia-smi") is None else detect_tpu(tmp_path)
    assert found is not None and found.extra == "tpu" and str(found) == "4 x TPU"


def test_tpu_by_pci_vendor_but_not_googles_network_card(tmp_path):
    (tmp_path / "dev/vfio").mkdir(parents=True)
    for slot, kind in (("0000:00:04.0", "0x020000"), ("0000:00:05.0", "0xff0000")):
        device = tmp_path / "sys/bus/pci/devices" / slot
        device.mkdir(parents=True)
        (device / "vendor").write_text("0x1ae0\n")
        (device / "class").write_text(f"{kind}\n")
    found = detect_tpu(tmp_path)
    assert found is not None and found.names == ("TPU",)


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        (None, '"jaxllm[cuda12]"'),
        ({"url": "file:///src/my%20lib", "dir_info": {"editable": True}}, '-e "/src/my lib[cuda12]"'),
        ({"url": "file:///src/lib", "dir_info": {}}, '"/src/lib[cuda12]"'),
        (
            {"url": "https://example.org/jaxllm.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
            '"jaxllm[cuda12] @ git+https://example.org/jaxllm.git"',
        ),
    ],
)
def test_the_install_line_names_the_place_that_jaxllm_came_from(source, wanted, monkeypatch):
    class Distribution:
        def read_text(self, name):
            assert name == "direct_url.json"
            return None if source is None else json.dumps(source)

    monkeypatch.setattr(accelerators.metadata, "distribution", lambda name: Distribution())
    assert requirement("cuda12") == wanted
    assert install_line(Accelerator("nvidia", driver="550.1")) == f"python -m pip install {wanted}"


def test_too_old_a_driver_is_told_first():
    assert "470.82" in install_line(Accelerator("nvidia", driver="470.82")) and "525" in install_line(
        Accelerator("nvidia", driver="470.82")
    )


def test_advice_only_beside_an_idle_accelerator(tmp_path, monkeypatch):
    monkeypatch.setattr(accelerators, "_nvidia_smi", lambda: "")
    for name in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    fake_nvidia(tmp_path, "580.65.06")
    given = advice("cpu", tmp_path)
    assert given is not None and "cuda13" in given[1]
    assert advice("gpu", tmp_path) is None
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert advice("cpu", tmp_path) is None
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert advice("cpu", tmp_path) is None


def test_doctor_prints_the_install_line(cli, monkeypatch):
    from jaxllm.cli import doctor

    found = Accelerator("nvidia", ("Tesla T4",), "550.54.15", (12, 4))
    monkeypatch.setattr(doctor.accelerators, "advice", lambda backend: (found, install_line(found)))
    shown = cli("doctor")
    assert "Tesla T4" in shown.out and "cuda12" in shown.out
