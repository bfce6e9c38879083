"""Downloads that break off go on, wrong ones are refused, and nothing half-made has a final name; against a real server."""

import hashlib
import json

import pytest
import torch

from canopy.errors import CanopyError, OutputError, SourceError
from canopy.model import foreign, pull
from canopy.model.package import CARD, load_model, read_contract
from canopy.model.pull import WeightFile, download, pull_backbone, pull_model, read_sources
from canopy.tiler.patience import Patience
from tests.model.test_foreign import chmv1_state

QUICK = Patience(attempts=3, first_pause_s=0.01, longest_pause_s=0.5, connect_s=2, silence_s=2)
SIZE = 5 * (1 << 20) + 123


@pytest.fixture
def content(tmp_path):
    data = torch.randint(0, 256, (SIZE,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy().tobytes()
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "weights.pth").write_bytes(data)
    return data


@pytest.fixture
def server(serve_folder, content, tmp_path):
    return serve_folder(tmp_path / "there")


def weights(server, content, **fields):
    sha256 = hashlib.sha256(content).hexdigest()
    return WeightFile(**{"name": "weights.pth", "url": server.href("weights.pth"), "sha256": sha256, **fields})


def ranges(server):
    return [request.range for request in server.requests]


def test_a_download_is_the_file_and_tells_how_far_it_is(server, content, tmp_path):
    told = []
    path = download(weights(server, content, size_bytes=SIZE), tmp_path / "d", progress=lambda *a: told.append(a))
    assert path.read_bytes() == content
    assert told[-1] == (5, 5)
    assert not list(path.parent.glob("*.part*"))
    assert download(weights(server, content), tmp_path / "d") == path
    assert server.count() == 1, "what is there and right is not fetched again"


def test_what_breaks_off_goes_on_where_it_was(server, content, tmp_path):
    server.fail("/weights.pth", truncate=True, times=2)
    assert download(weights(server, content), tmp_path / "d", patience=QUICK).read_bytes() == content
    first, second, third = ranges(server)
    assert first is None
    assert second.startswith("bytes=")
    assert int(third[6:-1]) > int(second[6:-1]) > SIZE // 3


def test_a_busy_server_is_asked_again_and_a_gone_one_is_reported(server, content, tmp_path):
    server.fail("/weights.pth", status=503, times=1)
    server.fail("/weights.pth", status=429, times=1, retry_after_s=0)
    assert download(weights(server, content), tmp_path / "d", patience=QUICK).read_bytes() == content
    for status, match in ((503, "HTTP 503; 3 tries"), (404, "not there any more"), (403, "not there for everybody")):
        server.fail("/weights.pth", status=status)
        with pytest.raises(SourceError, match=match):
            download(weights(server, content), tmp_path / "e", patience=QUICK)
        server.heal()
    server.fail("/weights.pth", status=429, retry_after_s=3600)
    with pytest.raises(SourceError, match="asks for a pause of 3600 s"):
        download(weights(server, content), tmp_path / "e", patience=QUICK)
    server.stop()
    with pytest.raises(SourceError, match=r"no connection.*goes on where it stopped"):
        download(weights(server, content), tmp_path / "e", patience=QUICK)
    assert [p.name for p in (tmp_path / "e").iterdir() if not p.name.startswith(".")] == []


def test_a_later_run_goes_on_and_starts_again_when_the_file_was_replaced(server, content, tmp_path):
    stop = 3 << 20

    def interrupt(done_mib, _total):
        if done_mib == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(weights(server, content), tmp_path / "d", progress=interrupt)
    part = tmp_path / "d" / "weights.pth.part"
    assert part.stat().st_size == stop
    assert not part.with_suffix("").exists()
    assert download(weights(server, content), tmp_path / "d").read_bytes() == content
    assert ranges(server)[-1] == f"bytes={stop}-"
    # Other bytes of the same length: the beginning is another file's, which the checksum shows.
    (tmp_path / "d" / "weights.pth").unlink()
    part.write_bytes(b"\0" * stop)
    with pytest.raises(SourceError, match=r"SHA-256 is .*run the command again"):
        download(weights(server, content), tmp_path / "d")
    assert download(weights(server, content), tmp_path / "d").read_bytes() == content, "the wrong beginning is gone"
    # All of it was there already, or more than there is.
    for beginning in (content, content + b"more"):
        (tmp_path / "d" / "weights.pth").unlink()
        part.write_bytes(beginning)
        assert download(weights(server, content), tmp_path / "d", patience=QUICK).read_bytes() == content


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"sha256": "0" * 64}, "SHA-256 is .* 00000000 is published"),
        ({"sha256": "0" * 8}, "00000000 is published"),
        ({"size_bytes": SIZE + 1}, "and 5,243,004 are published"),
    ],
)
def test_a_file_that_is_not_the_published_one_gets_no_name(fields, match, server, content, tmp_path):
    with pytest.raises(SourceError, match=match):
        download(weights(server, content, **fields), tmp_path / "d")
    assert not (tmp_path / "d" / "weights.pth").exists()
    assert not (tmp_path / "d" / "weights.pth.part").exists() or "size_bytes" in fields


def test_the_first_eight_digits_of_a_checksum_are_enough(server, content, tmp_path):
    file = weights(server, content, sha256=hashlib.sha256(content).hexdigest()[:8])
    assert download(file, tmp_path / "d").read_bytes() == content


def test_a_full_disk_is_a_line_and_what_is_there_stays(server, content, small_disk):
    folder = small_disk(3 << 20)
    with pytest.raises(OutputError, match="free space and run the command again"):
        download(weights(server, content), folder)
    assert [p.name for p in folder.iterdir() if p.suffix == ".pth"] == []
    assert (folder / "weights.pth.part").stat().st_size > 1 << 20


# --- to a model ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sources(serve_folder, tmp_path, monkeypatch):
    """(list of one open publication and one on request, its server)."""
    (tmp_path / "bucket").mkdir()
    monkeypatch.setitem(foreign._CHMV1_HEADS, 64, 4)  # a small one counts as published
    torch.save({"state_dict": chmv1_state()}, tmp_path / "bucket" / "v1.pth")
    served = serve_folder(tmp_path / "bucket")
    common = 'licence = "Apache-2.0"\nlicence_url = "https://example.org"\nlicence_says = "free"\n'
    digest = hashlib.sha256((tmp_path / "bucket" / "v1.pth").read_bytes()).hexdigest()
    (tmp_path / "sources.toml").write_text(
        f'[models.open]\nkind = "chmv1"\ntitle = "Open weights"\nunverified = ["the year"]\n{common}'
        f'[[models.open.file]]\nname = "v1.pth"\nurl = "{served.href("v1.pth")}"\nsha256 = "{digest}"\n'
        f'[models.closed]\nkind = "chmv2"\ntitle = "Closed weights"\nsteps = ["ask", "import"]\n{common}'
    )
    return tmp_path / "sources.toml", served


def test_pulled_weights_are_a_model(sources, tmp_path):
    said = []
    folder = pull_model("open", tmp_path / "m", sources=sources[0], say=said.append)
    assert said[:3] == ["Open weights", "licence: Apache-2.0, free (https://example.org)", "not verified: the year"]
    assert load_model(folder).contract.network.backbone_options["num_heads"] == 4
    assert "`v1.pth`" in (folder / CARD).read_text()
    assert not (tmp_path / "m.download").exists()
    with pytest.raises(OutputError, match="exists"):
        pull_model("open", folder, sources=sources[0])
    pull_model("open", folder, sources=sources[0], overwrite=True, keep=True)
    assert (tmp_path / "m.download" / "v1.pth").is_file()
    assert read_contract(folder).version == hashlib.sha256((tmp_path / "bucket" / "v1.pth").read_bytes()).hexdigest()[:8]


def test_weights_on_request_say_what_to_do_and_unknown_ones_what_there_is(sources, tmp_path):
    with pytest.raises(SourceError, match=r"closed is not openly downloadable \(Apache-2.0\): \(1\) ask; \(2\) import"):
        pull_model("closed", tmp_path / "m", sources=sources[0])
    with pytest.raises(SourceError, match="did you mean 'open'"):
        pull_model("opn", tmp_path / "m", sources=sources[0])
    (tmp_path / "bad.toml").write_text('[models.a]\nkind = "chmv1"\ntitel = "x"\n')
    with pytest.raises(SourceError, match=r"unknown key 'models\.a\.titel'"):
        pull_model("a", tmp_path / "m", sources=tmp_path / "bad.toml")


def test_the_shipped_list_is_sound():
    known = read_sources()
    assert {"chmv1-huge", "chmv1-large-compressed", "chmv2", "chmv2-hugging-face"} <= known.keys()
    for name, source in known.items():
        assert source.steps or all(file.url for file in source.file), f"{name} can neither be fetched nor asked for"
        assert source.licence_url.startswith("https://")
        assert all(not file.url or file.url.endswith(f"/{file.name}") for file in source.file)
        unpublished = any(file.sha256 is None for file in source.file)
        assert not unpublished or source.unverified, f"{name}: what nobody can check has to be said"
    assert [file.sha256 for file in known["chmv2"].file] == ["3703d643", "eadcf0ff"]
    for closed in (name for name, source in known.items() if source.steps):
        with pytest.raises(SourceError, match="not openly downloadable") as caught:
            pull_model(closed)
        assert "\n" not in str(caught.value)


def test_a_backbone_that_timm_has_not_or_that_cannot_be_fetched_is_a_line(monkeypatch):
    with pytest.raises(SourceError, match=r"no pretrained weights 'vit_huge_patch99'; give a name with its tag"):
        pull_backbone("vit_huge_patch99")
    assert not pull.is_backbone("vit_large_patch16_dinov3.sat493")
    assert pull.is_backbone("vit_large_patch16_dinov3.sat493m")

    def unreachable(name, *, pretrained, **_options):
        assert pretrained
        raise FileNotFoundError("cannot reach the hub\nmore")

    import timm

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(CanopyError, match=r"could not be fetched \(cannot reach the hub\)") as caught:
        pull_backbone("vit_small_patch16_dinov3.lvd1689m")
    assert "\n" not in str(caught.value)


def test_the_mark_of_a_part_that_cannot_be_read_is_no_mark(tmp_path):
    part = tmp_path / "a.part"
    assert pull._mark(part) is None
    pull._mark_path(part).write_text("{")
    assert pull._mark(part) is None
    pull._mark_path(part).write_text(json.dumps({"mark": "x"}))
    assert pull._mark(part) == "x"
