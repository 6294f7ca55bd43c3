"""Captions from every accepted file, the rows of a run, COCO's annotations, and the checked download."""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import json
import logging
import threading
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset

from dataset import captions as captions_module
from dataset import fetch as fetch_module
from dataset import prepare_coco
from dataset.captions import caption_dataset, load_captions
from dataset.fetch import PUBLIC_FILES, PublicFile, fetch
from llamagen.text import clean_caption

TWO = ["a photo of a bench", "Grünes Sofa, 沙发"]

CONVERSATIONS = [  # as AR-GRPO's prompt files have them: DrawBench without a picture's name, COCO with one
    {"id": "x0", "image_num": 0, "conversations": [{"from": "human", "value": TWO[0]}, {"from": "gpt", "value": ""}]},
    {"id": "x1", "image": "COCO_1.jpg", "conversations": [{"from": "human", "value": TWO[1]}]},
]
GENEVAL = [{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": text} for text in TWO]
FILES = {
    "strings.json": json.dumps(TWO),
    "prompts.json": json.dumps([{"prompt": text, "id": 3} for text in TWO]),
    "captions.json": json.dumps([{"caption": text} for text in TWO], ensure_ascii=False),
    "conversations.json": json.dumps(CONVERSATIONS),
    "marked.json": "\ufeff" + json.dumps(TWO),
    "geneval.json": json.dumps(GENEVAL),
    "geneval.jsonl": "\n".join(json.dumps(row) for row in GENEVAL),
    "strings.jsonl": "".join(json.dumps(text, ensure_ascii=False) + "\n" for text in TWO),
    "lines.txt": "\n".join(TWO) + "\n",
    "lines_crlf.TXT": "\r\n".join(TWO),
    "table.csv": f'id,caption\n1,{TWO[0]}\n2,"{TWO[1]}"\n',
    "table.tsv": f"text\tsource\n{TWO[0]}\tx\n{TWO[1]}\ty\n",
}


def write(folder: Path, name: str, content: str) -> Path:
    path = folder / name
    path.write_bytes(content.encode())
    return path


@pytest.mark.parametrize("name", FILES)
def test_every_accepted_form_gives_the_same_captions(tmp_path, name):
    assert load_captions(write(tmp_path, name, FILES[name])) == TWO


def test_a_named_column_is_read_instead_of_the_usual_ones(tmp_path):
    table = write(tmp_path, "parti.tsv", "Prompt\ttext\na bee\tno\n")
    assert load_captions(table, column="Prompt") == ["a bee"]
    rows = write(tmp_path, "rows.json", json.dumps([{"prompt": "no", "long": "a bee"}]))
    assert load_captions(rows, column="long") == ["a bee"]


def test_a_data_set_is_read_by_split_and_column(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    Dataset.from_dict({"sentence": TWO, "n": [1, 2]}).to_parquet(tmp_path / "data" / "test.parquet")
    assert load_captions(tmp_path / "data", column="sentence", split="test") == TWO
    with pytest.raises(ValueError, match=r"no 'prompt' or 'caption' or 'text', only \['sentence', 'n'\]"):
        load_captions(tmp_path / "data", split="test")
    with pytest.raises(ValueError, match="holds int, not text"):
        load_captions(tmp_path / "data", column="n", split="test")


def test_a_data_set_that_is_not_there_shows_what_is_accepted(monkeypatch):
    def unreachable(name, split):
        raise ConnectionError("offline")

    monkeypatch.setattr(captions_module, "load_dataset", unreachable)
    with pytest.raises(ValueError, match=r"'somebody/captions' is neither .* \(offline\); accepted are"):
        load_captions("somebody/captions")


def test_blank_rows_go_repeated_and_long_ones_stay_and_one_line_counts_them(tmp_path, caplog):
    rows = ["a cat", "", {"prompt": None}, "   ", "a dog", "a cat", {"prompt": "a very long caption"}]
    path = write(tmp_path, "rows.json", json.dumps(rows))
    caplog.set_level(logging.INFO, logger="dataset.captions")
    kept = load_captions(path, count_tokens=lambda texts: [len(text.split()) for text in texts], max_tokens=3)
    assert kept == ["a cat", "a dog", "a cat", "a very long caption"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: 4 captions, 3 blank rows dropped, 1 duplicates, 1 cut to 3 tokens"
    ]


def test_empty_and_repeated_captions_are_counted_as_the_policy_sees_them(tmp_path, caplog):
    # '###' and 'https://' are nothing after cleaning, 'A DOG ' is 'a dog': what the policy is given decides
    path = write(tmp_path, "rows.json", json.dumps(["a dog", "A DOG ", "###", "https://", " ", "a cat"]))
    caplog.set_level(logging.INFO, logger="dataset.captions")
    assert load_captions(path, prepare=clean_caption) == ["a dog", "A DOG ", "###", "https://", "a cat"]
    assert load_captions(path) == ["a dog", "A DOG ", "###", "https://", "a cat"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: 5 captions, 1 blank rows dropped, 1 duplicates, 2 empty after cleaning",
        f"{path}: 5 captions, 1 blank rows dropped, 0 duplicates",
    ]


def test_an_empty_line_of_a_table_is_no_row_and_quotes_protect_commas_and_quotes(tmp_path):
    table = write(tmp_path, "a.csv", 'id,prompt\n\n1,"a red, ""blue"" dog"\n2,\n')
    assert load_captions(table) == ['a red, "blue" dog']


@pytest.mark.parametrize(
    ("name", "content", "advice"),
    [
        ("a.yaml", "- a cat", "ending '.yaml' are not read; accepted are"),
        ("a.json", "{broken", "is no JSON"),
        ("a.json", '{"prompt": "a cat"}', "one dict instead of a list; accepted are"),
        ("a.json", '["a cat", 5]', "row 2 holds no caption: 5; accepted are"),
        ("a.json", '[{"prompt": ["a", "b"]}]', "row 1 holds no caption"),
        ("a.json", '[{"title": "a cat"}]', r"row 1 has no 'prompt' or 'caption' or 'text', only \['title'\]"),
        ("a.json", '[{"conversations": [{"from": "human"}]}]', "row 1 holds no caption"),
        ("a.json", '[{"conversations": ["a cat"]}]', "row 1 holds no caption"),
        ("a.json", '[{"conversations": {"value": "a dog"}}]', r"row 1 holds no caption: \{.*a dog.*; accepted are"),
        ("a.json", "[" * 100_000, r"a\.json nests its values too deeply for captions; accepted are"),
        ("a.jsonl", '"a cat"\n' + "[" * 100_000, r"line 2 nests its values too deeply for captions; accepted are"),
        ("a.json", "[" + "1" * 5000 + "]", r"is no JSON \(Exceeds the limit"),
        (
            "a.csv",
            "prompt\na red, blue dog\n",
            r"a\.csv, line 2 has 2 fields, the header 1: put captions with commas in",
        ),
        ("a.csv", "id,prompt\n1,a cat\n2\n", "line 3 has 1 fields, the header 2: put captions with commas in quotes"),
        ("a.tsv", "id\tprompt\n1\ta\tcat\n", "line 2 has 3 fields, the header 2: put captions with tabs in quotes"),
        ("a.csv", 'prompt\n"a cat\na dog\n', r"line 3 is no csv \(unexpected end of data\): put .*; accepted are"),
        ("a.csv", 'prompt\n"a" cat\n', r"line 2 is no csv \(',' expected after '\"'\): put .* inside quotes twice"),
        ("a.csv", "prompt\n" + "a" * 131_073, r"line 2 is no csv \(field larger than field limit .*; accepted are"),
        ("a.json", '{"images": [], "annotations": []}', r"python -m dataset\.prepare_coco"),
        ("a.jsonl", '"a cat"\nmeow\n', "line 2 is no JSON"),
        ("a.csv", "id,title\n1,a cat\n", r"only \['id', 'title'\]: name the one"),
        ("a.txt", "\n  \n", "all of its 2 rows are blank"),
        ("a.json", "[]", "all of its 0 rows are blank"),
    ],
)
def test_anything_else_is_refused_with_what_is_accepted(tmp_path, name, content, advice):
    with pytest.raises(ValueError, match=advice):
        load_captions(write(tmp_path, name, content))


def test_a_folder_of_files_that_do_not_parse_is_refused_with_what_is_accepted(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    with pytest.raises(ValueError, match=r"data are no data set \(.*any data files\); accepted are"):
        load_captions(tmp_path / "data")
    write(tmp_path / "data", "train.json", "{broken")
    with pytest.raises(ValueError, match=r"data are no data set \(JSON parse error: .*\); accepted are"):
        load_captions(tmp_path / "data")


def test_a_missing_file_and_another_encoding_are_named(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        load_captions(tmp_path / "prompts.txt")
    (tmp_path / "latin.txt").write_bytes("Grün".encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8"):
        load_captions(tmp_path / "latin.txt")


# The rows of a run


def test_each_pass_shows_each_caption_once_in_its_own_order():
    names = [f"caption {i}" for i in range(20)]
    rows = caption_dataset(names, 50, seed=0)
    assert rows.column_names == ["prompt", "caption"]
    assert list(rows["prompt"]) == list(rows["caption"])
    first, second, rest = rows["prompt"][:20], rows["prompt"][20:40], rows["prompt"][40:]
    assert sorted(first) == sorted(second) == sorted(names)
    assert first != second and first != names
    assert len(rest) == 10 and max(Counter(rest).values()) == 1


def test_the_seed_fixes_the_rows_and_a_longer_run_starts_like_a_shorter_one():
    names = [f"caption {i}" for i in range(20)]
    short, long, other = (list(caption_dataset(names, n, seed)["prompt"]) for n, seed in ((30, 3), (75, 3), (30, 4)))
    assert long[:30] == short
    assert other != short


def test_a_run_without_captions_or_rows_is_refused():
    with pytest.raises(ValueError, match="at least 1 of each"):
        caption_dataset([], 5, seed=0)
    with pytest.raises(ValueError, match="at least 1 of each"):
        caption_dataset(["a cat"], 0, seed=0)


# COCO


def coco_annotations(num_images: int = 30) -> dict:
    """COCO's captions file in small: five captions an image, some with a line break."""
    ids = [7 * i + 1 for i in range(num_images)]
    return {
        "images": [{"id": i, "file_name": f"COCO_train2014_{i:012d}.jpg"} for i in ids],
        "annotations": [
            {"id": 1000 + 5 * i + k, "image_id": i, "caption": f"Image {i},\n caption {k}. "}
            for i in ids
            for k in range(5)
        ],
    }


def test_coco_captions_are_of_different_images_and_follow_the_seed_not_the_file_order():
    annotations = coco_annotations()
    rows = prepare_coco.pick_captions(annotations, 20, seed=1)
    assert len({row["image"] for row in rows}) == 20
    for row in rows:
        image_id = int(row["image"].removeprefix("COCO_train2014_").removesuffix(".jpg"))
        assert row["conversations"][0]["value"].startswith(f"Image {image_id}, caption ")  # line break gone
    annotations["annotations"].reverse()
    assert prepare_coco.pick_captions(annotations, 20, seed=1) == rows
    assert prepare_coco.pick_captions(annotations, 20, seed=2) != rows


@pytest.mark.parametrize("published", ["annotations_trainval2014.zip", "captions_train2014.json"])
def test_the_coco_command_makes_a_prompt_file(tmp_path, published, capsys):
    source, content = tmp_path / published, json.dumps(coco_annotations())
    if source.suffix == ".zip":
        with zipfile.ZipFile(source, "w") as archive:
            archive.writestr("annotations/captions_val2014.json", "{}")
            archive.writestr("annotations/captions_train2014.json", content)
    else:
        source.write_text(content)
    out = tmp_path / "new" / "coco.json"
    prepare_coco.main([str(source), "--out", str(out), "--num_captions", "12"])
    assert "12 captions" in capsys.readouterr().out
    assert len(set(load_captions(out))) == 12
    assert [path.name for path in out.parent.iterdir()] == ["coco.json"]


def test_wrong_coco_files_say_where_the_right_ones_are(tmp_path):
    where = "annotations_trainval2014.zip"
    with pytest.raises(ValueError, match=f"no file .*{where}"):
        prepare_coco.read_annotations(tmp_path / "none.zip", "train2014")
    with pytest.raises(ValueError, match=f"half a download.*{where}"):
        prepare_coco.read_annotations(write(tmp_path, "a.zip", "PK"), "train2014")
    with pytest.raises(ValueError, match=f"instances_.*{where}"):
        prepare_coco.pick_captions({"images": [], "annotations": [{"bbox": []}]}, 1, seed=0)
    with pytest.raises(ValueError, match="31 captions of different images are wanted, 30 images have one"):
        prepare_coco.pick_captions(coco_annotations(), 31, seed=0)


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("none.zip", None, [], r"error: there is no file .*none\.zip\. COCO's captions"),
        ("a.zip", "PK", [], r"error: .*a\.zip is neither a \.json nor a whole \.zip"),
        ("a.json", "{broken", [], r"error: .*a\.json is no JSON \(Expecting property name.*COCO's captions"),
        ("a.json", "[" * 100_000, [], r"error: .*a\.json is no JSON \(maximum recursion depth"),
        ("a.json", '["a cat"]', [], "error: no caption annotations .*COCO's captions"),
        ("a.json", '{"images": [], "annotations": []}', [], "error: no caption annotations"),
        ("a.json", '{"images": [{"id": 1}], "annotations": [5]}', [], "error: no caption annotations"),
        ("a.json", json.dumps(coco_annotations()), ["--num_captions", "31"], "error: 31 captions of different images"),
        (
            "a.json",
            json.dumps({**coco_annotations(), "images": []}),
            [],
            r"error: annotation 1005 is of image 1, which is not listed: the file is not COCO's own\. COCO's captions",
        ),
    ],
)
def test_the_coco_command_ends_in_one_line_for_what_is_no_coco(tmp_path, name, content, options, message):
    if content is not None:
        write(tmp_path, name, content)
    with pytest.raises(SystemExit, match=message) as end:
        prepare_coco.main([str(tmp_path / name), "--out", str(tmp_path / "out.json"), *options])
    assert "\n" not in end.value.code
    assert not (tmp_path / "out.json").exists()


def test_a_damaged_coco_archive_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("captions_train2014.json", "a dog on a bench")
    content = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(content.replace(b"a dog", b"a cat", 1))
    with pytest.raises(ValueError, match=r"a\.zip is damaged at captions_train2014\.json \(Bad CRC-32"):
        prepare_coco.read_annotations(tmp_path / "a.zip", "train2014")


# Fetching


@pytest.fixture
def server():
    """A publisher on the loopback: path -> bytes; `.asked` lists what was requested."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked.append(self.path)
            content = self.server.files.get(self.path)
            self.send_response(200 if content is not None else 404)
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.files, httpd.asked = {}, []
        thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
        thread.start()
        yield httpd
        httpd.shutdown()
        thread.join()


def published(server, content: bytes, expected: bytes) -> PublicFile:
    """A file that the server gives as `content` where `expected` was published."""
    server.files["/prompts.txt"] = content
    url = f"http://127.0.0.1:{server.server_port}/prompts.txt"
    return PublicFile(url, "bench/prompts.txt", len(expected), hashlib.sha256(expected).hexdigest())


def test_a_genuine_file_is_fetched_once(server, tmp_path):
    public_file = published(server, b"a cat\n", b"a cat\n")
    for _ in range(2):
        assert fetch(public_file, tmp_path).read_bytes() == b"a cat\n"
    assert server.asked == ["/prompts.txt"]
    assert [path.name for path in (tmp_path / "bench").iterdir()] == ["prompts.txt"]


def test_a_damaged_copy_is_replaced(server, tmp_path):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench/prompts.txt").write_bytes(b"a c")
    assert fetch(published(server, b"a cat\n", b"a cat\n"), tmp_path).read_bytes() == b"a cat\n"


@pytest.mark.parametrize("content", [b"<html>sign in</html>", b"a ca", b"a cat\nand more", b""])
def test_anything_but_the_published_bytes_is_refused_and_not_kept(server, tmp_path, content):
    public_file = published(server, content, b"a cat\n")
    with pytest.raises(ValueError, match=public_file.sha256):
        fetch(public_file, tmp_path)
    assert not (tmp_path / "bench").exists()


def test_an_unreachable_publisher_says_what_to_do_by_hand(server, tmp_path):
    public_file = published(server, b"a cat\n", b"a cat\n")
    server.files.clear()
    with pytest.raises(ValueError, match=r"cannot be reached \(HTTP Error 404.*put it at .*bench/prompts\.txt"):
        fetch(public_file, tmp_path)


def test_only_encrypted_addresses_are_asked(tmp_path):
    for url in ("http://example.org/a", "file:///etc/hostname", "file://localhost/etc/hostname"):
        with pytest.raises(ValueError, match="only https"):
            fetch(PublicFile(url, "a", 1, "0" * 64), tmp_path)


def test_the_fetch_command_fills_a_folder_and_refuses_unknown_names(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fetch_module, "PUBLIC_FILES", {"cats": (published(server, b"a cat\n", b"a cat\n"),)})
    fetch_module.main(["--into", str(tmp_path)])
    assert (tmp_path / "bench/prompts.txt").read_bytes() == b"a cat\n"
    with pytest.raises(SystemExit):
        fetch_module.main(["dogs"])
    assert "unknown: dogs; choose from cats" in capsys.readouterr().err


def test_the_fetch_command_goes_on_after_a_file_that_cannot_be_had(server, tmp_path, monkeypatch, capsys):
    there = published(server, b"a cat\n", b"a cat\n")
    gone = dataclasses.replace(there, url=there.url + ".gone", path="bench/gone.txt")
    unreachable = dataclasses.replace(there, url="http://127.0.0.1:9/a", path="bench/a.txt")  # nobody listens there
    monkeypatch.setattr(fetch_module, "PUBLIC_FILES", {"dogs": (gone, unreachable), "cats": (there,)})
    with pytest.raises(SystemExit) as stopped:
        fetch_module.main(["--into", str(tmp_path)])
    assert stopped.value.code == 1
    output = capsys.readouterr()
    assert output.out == f"{tmp_path / 'bench/prompts.txt'}\n"
    first, second = output.err.splitlines()
    assert first.startswith(f"error: {gone.url} cannot be reached (HTTP Error 404")
    assert f"put it at {tmp_path / 'bench/gone.txt'} and run this again" in first
    assert second.startswith("error: http://127.0.0.1:9/a cannot be reached (")


def test_every_listed_file_is_encrypted_and_checked():
    files = [public_file for group in PUBLIC_FILES.values() for public_file in group]
    assert {Path(file.path).name for file in files} == {
        "evaluation_metadata.jsonl",
        "object_names.txt",
        "drawbench_test_1000.json",
    }
    for file in files:
        assert file.url.startswith("https://raw.githubusercontent.com/")
        assert len(bytes.fromhex(file.sha256)) == 32
