"""What is kept of compiled kernels, without a GPU: the compiler is a stand-in."""

import pytest

from medlora.kernels import cuda


@pytest.fixture
def made(monkeypatch, tmp_path):
    """Each compilation, as (code, options)."""
    found = []

    def compile_(code, file, options):
        found.append((code, options))
        return f"{code} {options}".encode() * 100

    monkeypatch.setattr(cuda, "_compile", compile_)
    monkeypatch.setenv("PYTORCH_KERNEL_CACHE_PATH", str(tmp_path / "kernels"))
    monkeypatch.delenv("USE_PYTORCH_KERNEL_CACHE", raising=False)
    return found


def test_the_next_process_finds_what_was_compiled(made, tmp_path, monkeypatch):
    first = cuda.compiled("code", "x.cu", ["-DN=1"])
    assert cuda.compiled("code", "x.cu", ["-DN=1"]) == first and len(made) == 1
    others = [("code", ["-DN=2"]), ("code", ["-DN=1", "-DM=1"]), ("other", ["-DN=1"])]
    assert len({first, *(cuda.compiled(code, "x.cu", options) for code, options in others)}) == 4
    monkeypatch.setattr(cuda.torch.version, "cuda", "another")
    cuda.compiled("code", "x.cu", ["-DN=1"])
    assert len(made) == 5 and len(list((tmp_path / "kernels").iterdir())) == 5


@pytest.mark.parametrize("damage", [lambda kept: kept[:-1], lambda kept: b"", lambda kept: kept + b"\0"])
def test_what_is_damaged_is_made_again(made, tmp_path, damage):
    first = cuda.compiled("code", "x.cu", [])
    (place,) = (tmp_path / "kernels").iterdir()
    place.write_bytes(damage(place.read_bytes()))
    assert cuda.compiled("code", "x.cu", []) == first and len(made) == 2
    assert cuda.compiled("code", "x.cu", []) == first and len(made) == 2


def test_a_folder_that_cannot_be_written_does_not_matter(made, tmp_path):
    (tmp_path / "kernels").write_text("a file")
    assert cuda.compiled("code", "x.cu", []) == cuda.compiled("code", "x.cu", [])
    assert len(made) == 2


def test_nothing_is_kept_where_pytorch_is_to_keep_nothing(made, tmp_path, monkeypatch):
    monkeypatch.setenv("USE_PYTORCH_KERNEL_CACHE", "0")
    cuda.compiled("code", "x.cu", [])
    cuda.compiled("code", "x.cu", [])
    assert len(made) == 2 and not (tmp_path / "kernels").exists()


def test_without_a_variable_it_is_the_users_cache(made, tmp_path, monkeypatch):
    monkeypatch.delenv("PYTORCH_KERNEL_CACHE_PATH")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cuda.compiled("code", "x.cu", [])
    assert len(list((tmp_path / "torch" / "kernels").iterdir())) == 1


def test_what_does_not_compile_is_not_kept(made, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("x.cu(1): error")

    monkeypatch.setattr(cuda, "_compile", broken)
    with pytest.raises(RuntimeError, match="error"):
        cuda.compiled("code", "x.cu", [])
    assert not (tmp_path / "kernels").exists()
