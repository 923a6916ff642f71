"""Claims about source trees and archives: long documents in stable order, and nothing taken from a hostile archive."""

import bz2
import gzip
import io
import lzma
import re
import tarfile
from html.parser import HTMLParser

import pytest
import zstandard

from nsa_train.data.ledger import Ledger
from nsa_train.data.trees import html_text, tar_documents, tree_documents
from nsa_train.errors import DataError

FILES = {
    "top.py": "top",
    "a/one.py": "1",
    "a/two.md": "2 é",
    "a/deep/three.py": "3",
    "b/four.py": "4",
    "b/.hidden/no.py": "hidden",
    ".git/no.py": "hidden",
    "b/table.bin.py": "nul \0 byte",
}


@pytest.fixture
def tree(tmp_path):
    for name, text in FILES.items():
        (tmp_path / "repo" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "repo" / name).write_text(text)
    (tmp_path / "repo/b/latin.py").write_bytes(b"\xe9")
    (tmp_path / "repo/a/link.py").symlink_to(tmp_path / "repo/b/four.py")
    return tmp_path


def tar_of(members, mode="w", **options):
    """A tar archive of (name or TarInfo, content) pairs, as bytes."""
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode=mode, **options) as tar:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return held.getvalue()


def ar_member(name, content):
    header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
    return header + content + b"\n" * (len(content) % 2)


def deb_of(payload, name="data.tar.xz"):
    return (
        b"!<arch>\n"
        + ar_member("debian-binary", b"2.0\n")
        + ar_member("control.tar", b"odd")
        + ar_member(name, payload)
    )


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def bodies(documents):
    return {document.title: document.text for document in documents}


def read_tree(data_config, **fields):
    ledger = Ledger("stop")
    data = data_config(kind="tree", paths=("repo",), **fields)
    return list(tree_documents(data, data.paths, ledger)), ledger.left_out


def read_tar(data_config, tmp_path, content, name="x.tar", on_error="stop", **fields):
    (tmp_path / name).write_bytes(content)
    ledger = Ledger(on_error)
    data = data_config(kind="tar", paths=(name,), **fields)
    return list(tar_documents(data, data.paths, ledger)), ledger


def test_a_tree_is_one_document_with_its_files_in_the_order_of_their_paths(tree, data_config):
    documents, left_out = read_tree(data_config, depth=0)
    (document,) = documents
    assert document.text == (
        "==== a/deep/three.py ====\n3\n==== a/one.py ====\n1\n==== a/two.md ====\n2 é\n"
        "==== b/four.py ====\n4\n==== top.py ====\ntop"
    )
    assert (document.source, document.title) == ("repo", "repo")
    assert left_out == {"not text": 2}


@pytest.mark.parametrize(
    ("depth", "titles"),
    [(1, {"repo", "repo/a", "repo/b"}), (2, {"repo", "repo/a", "repo/a/deep", "repo/b"}),
     (None, {"repo", "repo/a", "repo/a/deep", "repo/b"})],
)  # fmt: skip
def test_folders_at_a_depth_become_documents(depth, titles, tree, data_config):
    found = bodies(read_tree(data_config, depth=depth)[0])
    assert found.keys() == titles
    assert found["repo"] == "==== top.py ====\ntop"
    headers = [header for text in found.values() for header in re.findall(r"^==== (\S+) ====$", text, re.M)]
    assert sorted(headers) == ["a/deep/three.py", "a/one.py", "a/two.md", "b/four.py", "top.py"]


def test_patterns_say_which_files_count(tree, data_config):
    (document,) = read_tree(data_config, depth=0, include=("*.py",), exclude=("b/*", "*/deep/*"))[0]
    assert re.findall(r"==== (\S+)", document.text) == ["a/one.py", "top.py"]


def test_a_tree_that_is_no_folder_is_named(tree, data_config):
    data = data_config(kind="tree", paths=("repo/top.py",))
    with pytest.raises(DataError, match=r"repo/top\.py: no such folder"):
        list(tree_documents(data, data.paths, Ledger("stop")))


MEMBERS = [(f"./{name}", text.encode()) for name, text in sorted(FILES.items())]


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("x.tar", bytes),
        ("x.tar.xz", lzma.compress),
        ("x.tar.zst", zstandard.compress),
        ("x.tgz", gzip.compress),
        ("x.tar.bz2", bz2.compress),
        ("x.deb", lambda content: deb_of(lzma.compress(content))),
        ("x.tar", lambda content: tar_of([("inner.tar.xz", lzma.compress(content))])),
    ],
)
def test_an_archive_gives_the_documents_of_the_tree_it_holds(name, pack, tree, data_config, tmp_path):
    expected = read_tree(data_config, depth=1)[0]
    found, _ = read_tar(data_config, tmp_path, pack(tar_of(MEMBERS)), name, depth=1)
    assert {d.title.replace(name, "repo"): d.text for d in found} == bodies(expected)


def test_files_of_one_folder_stay_together_though_another_comes_between(data_config, tmp_path):
    members = [("a/1.py", b"1"), ("a/sub/2.py", b"2"), ("a/3.py", b"3"), ("b/4.py", b"4")]
    found, _ = read_tar(data_config, tmp_path, tar_of(members), depth=None)
    assert [re.findall(r"==== (\S+)", document.text) for document in found] == [
        ["a/sub/2.py"], ["a/1.py", "a/3.py"], ["b/4.py"],
    ]  # fmt: skip


HOSTILE = [
    (("/etc/passwd.py", b"x"), "leaves the archive"),
    (("a/../../up.py", b"x"), "leaves the archive"),
    ((special("pipe.py", tarfile.FIFOTYPE), b""), "is a device or a pipe"),
    ((special("disk.py", tarfile.BLKTYPE), b""), "is a device or a pipe"),
]


@pytest.mark.parametrize(("member", "problem"), HOSTILE)
def test_a_hostile_member_is_refused_by_name(member, problem, data_config, tmp_path):
    content = tar_of([("good.py", b"good"), member, ("after.py", b"after")])
    name = member[0].name if isinstance(member[0], tarfile.TarInfo) else member[0]
    with pytest.raises(DataError, match=rf"x\.tar: member '{re.escape(name)}' {problem}; do not trust this archive"):
        read_tar(data_config, tmp_path, content)
    (document,), ledger = read_tar(data_config, tmp_path, content, on_error="skip", depth=0)
    assert document.text == "==== good.py ====\ngood\n==== after.py ====\nafter"
    assert ledger.left_out == {"broken": 1}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_are_never_followed(kind, data_config, tmp_path):
    (tmp_path / "secret.py").write_text("secret")
    link = special("link.py", kind, str(tmp_path / "secret.py"))
    (document,), ledger = read_tar(data_config, tmp_path, tar_of([("good.py", b"good"), (link, b"")]), depth=0)
    assert document.text == "==== good.py ====\ngood"
    assert ledger.left_out == {"link": 1}


def test_a_member_beyond_the_limit_is_refused_before_it_is_read(data_config, tmp_path, monkeypatch):
    monkeypatch.setattr("nsa_train.data.trees.LARGEST_FILE_BYTES", 3)
    with pytest.raises(DataError, match=r"member 'big\.py' is 4 bytes long"):
        read_tar(data_config, tmp_path, tar_of([("big.py", b"1234")]))


LONG = tar_of([(f"{i}.py", bytes(f"{i} " * 3000, "ascii")) for i in range(20)])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.tar", LONG[: len(LONG) // 2]),
        ("x.tar", LONG[: LONG.index(b"9.py")]),  # at the border of a member
        ("x.tar.xz", lzma.compress(LONG)[:-200]),
        ("x.tar.zst", zstandard.compress(LONG)[:-8]),
        ("x.tar", b"certainly no archive" * 100),
        ("x.deb", deb_of(lzma.compress(LONG))[:-300]),
        ("x.deb", deb_of(b"")[:80]),
        ("x.deb", LONG),
        ("x.tar", LONG.replace(b"\x009.py", b"\x00X.py")),  # a damaged header in the middle
    ],
)
def test_a_cut_archive_is_never_a_shorter_one(name, content, data_config, tmp_path):
    with pytest.raises(DataError, match=rf"^{re.escape(name)}: (ends|not a)"):
        read_tar(data_config, tmp_path, content, name)
    found, ledger = read_tar(data_config, tmp_path, content, name, on_error="skip")
    assert ledger.left_out == {"broken": 1}
    assert len(found) <= 1


@pytest.mark.parametrize("size", [b"12x", b"-60", b""])
def test_a_package_with_a_wrong_size_is_named(size, data_config, tmp_path):
    package = deb_of(b"")
    start = package.index(b"data.tar")
    broken = package[: start + 48] + size.ljust(10) + package[start + 58 :]
    with pytest.raises(DataError, match=r"the size of 'data\.tar\.xz' is no number"):
        read_tar(data_config, tmp_path, broken, "x.deb")


def test_a_page_needs_no_end_of_its_head_and_may_be_no_page(data_config, tmp_path, monkeypatch):
    assert html_text("<html><head><title>t</title><body><p>a</p>") == "a\n"

    def fails(self, page):
        raise AssertionError("as some versions of the library do for a declaration that is none")

    monkeypatch.setattr(HTMLParser, "feed", fails)
    found, ledger = read_tar(data_config, tmp_path, tar_of([("a.html", b"<![foo[bar]]>"), ("b.md", b"text")]))
    assert ledger.left_out == {"not HTML": 1}
    assert "text" in found[0].text


def test_a_page_is_what_a_reader_sees():
    page = (
        "<html><head><title>t</title></head><body><p>a &amp; b</p><script>x()</script><pre>  code\n  more</pre></body>"
    )
    assert html_text(page) == "a & b\n\n  code\n  more\n"
