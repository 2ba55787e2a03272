"""The folder of a Ray session: private, short enough, and emptied but for logs."""

from __future__ import annotations

import tempfile

from serving.cluster.ray.session_folder import clear, make_folder, messages_file, ray_folder, remove


def test_it_is_private_and_its_name_is_short(tmp_path, monkeypatch):
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    for parent in (None, str(deep)):
        monkeypatch.setattr(tempfile, "tempdir", parent)
        folder = make_folder()
        assert folder.stat().st_mode & 0o777 == 0o700
        assert len(str(ray_folder(folder) / "s1234/sockets/plasma_store")) <= 107
        remove(folder)
        assert not folder.exists()


def test_logs_alone_are_left(tmp_path):
    ray = ray_folder(tmp_path)
    for name in ("data", "s1.token", "ray/s1/sockets/raylet", "ray/s1/port"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (ray / "session_latest").symlink_to(ray / "s1")
    kept = {ray / "s1/logs/old/raylet.out", ray / "s2/logs/gcs.out", messages_file(tmp_path)}
    for path in kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    clear(tmp_path)
    assert {path for path in tmp_path.rglob("*") if not path.is_dir() or path.is_symlink()} == kept
    clear(tmp_path / "nowhere")
