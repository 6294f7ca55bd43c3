"""Judges behind servers: nothing but plain data comes in, and every failure is bounded and explained."""

import base64
import json
import os
import pickle
import socket
import threading
import tracemalloc

import httpx2
import msgpack
import numpy as np
import pytest
from local_server import closed_port, serve
from PIL import Image
from test_rewards_scorer import Brightness
from tiny_judges import pictures

from reward_utils import plain_pickle
from reward_utils.arguments import ScorerArguments
from reward_utils.images import png_bytes, to_bytes
from reward_utils.registry import build_scorers
from reward_utils.remote import TOKEN_VARIABLE, parse_remote
from reward_utils.server import RewardServer
from reward_utils.transport import Server, ServerError
from reward_utils.unified_reward import read_final_score


class Smuggler:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr("reward_utils.transport.FIRST_PAUSE_S", 0.01)


def judges(names, **settings):
    return build_scorers(names, ScorerArguments(**{"server_retries": 1, "server_timeout_s": 5.0, **settings}))


# plain pickle


@pytest.mark.parametrize("protocol", range(6))
def test_plain_data_survives_every_protocol(protocol):
    value = {"outputs": [0.2, 1, -10.0, True, None], "text": "ä", "nested": {"a": [[], {}]}}
    if protocol >= 3:  # older ones write bytes as a call of a function
        value["raw"] = b"\x00\xff"
    assert plain_pickle.loads(pickle.dumps(value, protocol)) == value
    assert pickle.loads(plain_pickle.dumps(value)) == value


@pytest.mark.parametrize("protocol", range(6))
def test_code_is_never_run(protocol, tmp_path):
    marker = tmp_path / "was-here"
    with pytest.raises(ValueError, match="only plain data is read"):
        plain_pickle.loads(pickle.dumps({"outputs": [0.5, Smuggler(marker)]}, protocol))
    assert not marker.exists()


@pytest.mark.parametrize(
    "attack",
    [
        b"cos\nsystem\n(S'touch was-here'\ntR.",  # GLOBAL and REDUCE
        b"(S'touch was-here'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'touch was-here'\no.",  # OBJ
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",  # STACK_GLOBAL
        b"\x80\x02\x82\x01.",  # EXT1, the extension registry
        b"Pelsewhere\n.",  # a persistent reference
        b"\x80\x02K\x01Q.",  # the same, binary
        b"cbuiltins\neval\n.",
        b"c__builtin__\ngetattr\n.",
        b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b".",  # bytes that are not there
        b"not a pickle",
        b"",
    ],
)
def test_handmade_pickles_are_refused(attack, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="refused a pickle"):
        plain_pickle.loads(attack)
    assert list(tmp_path.iterdir()) == []


def test_other_types_are_refused_with_their_place():
    for value, message in [
        ({"a": [1, (2,)]}, r"reply\['a'\]\[1\] is a builtins.tuple"),
        ({1: 2}, "a key of type int"),
        ([{1, 2}], r"reply\[0\] is a builtins.set"),
        (bytearray(b"x"), "only plain data is read|builtins.bytearray"),
    ]:
        with pytest.raises(ValueError, match=message):
            plain_pickle.loads(pickle.dumps(value))
    with pytest.raises(ValueError, match="only plain data"):
        plain_pickle.loads(pickle.dumps([np.float64(0.5)]))
    deep, bomb = [], ["x"] * 100
    for _ in range(40):
        deep = [deep]
    for _ in range(10):
        bomb = [bomb] * 100  # small as a pickle, 10^22 values to walk through
    for value in (deep, bomb):
        with pytest.raises(ValueError, match="deeper than 16 or holds more than"):
            plain_pickle.loads(pickle.dumps(value))


def test_small_pickles_cannot_take_much_memory():
    far = b"\x80\x04]r" + (2**24).to_bytes(4, "little") + b"."  # remember this list as number 2^24: 256 MB in C
    wide = [None] * 2_000_000
    tracemalloc.start()
    try:
        assert plain_pickle.loads(far) == []
        with pytest.raises(TypeError, match="holds more than"):
            plain_pickle.dumps(wide)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_only_plain_data_is_sent():
    with pytest.raises(TypeError, match=r"request\['meta'\]\[0\] is a numpy.str_"):
        plain_pickle.dumps({"meta": [np.str_("red")]})


# DeQA and GenEval


def test_deqa_sends_jpeg_in_chunks_and_reads_its_list(monkeypatch):
    monkeypatch.setattr("reward_utils.deqa.IMAGES_PER_REQUEST", 2)

    def answer(request):
        if request.method == "GET":
            return 405, b"only POST"
        files = pickle.loads(request.body)["images"]
        assert all(data.startswith(b"\xff\xd8\xff") for data in files)
        return 200, pickle.dumps({"outputs": [len(files) / 10] * len(files)})

    with serve(answer) as server:
        judge = judges(["deqa"], deqa_url=server.url)["deqa"]
        judge.check()
        assert judge(pictures(3, 16), [""] * 3) == [0.2, 0.2, 0.1]


GENEVAL = [
    {"tag": "counting", "include": [{"class": "clock", "count": 2}], "prompt": "a photo of two clocks"},
    {"tag": "colors", "include": [{"class": "cup", "count": 1, "color": "red"}]},
]


@pytest.mark.parametrize(("kind", "expected"), [("rewards", [1, 0]), ("scores", [1, 0.5]), ("strict_rewards", [0, 0])])
def test_geneval_sends_metadata_and_reads_the_chosen_list(kind, expected):
    def answer(request):
        sent = pickle.loads(request.body)
        assert sent["only_strict"] is False
        assert sent["meta_datas"][0] == GENEVAL[0]
        assert sent["meta_datas"][1] == {**GENEVAL[1], "prompt": "a photo of a red cup"}
        groups = {"counting": [1.0, -10.0]}
        reply = {"scores": [1.0, 0.5], "rewards": [1.0, 0.0], "strict_rewards": [0.0, 0.0], "group_rewards": groups}
        return 200, pickle.dumps(reply)

    with serve(answer) as server:
        judge = judges(["geneval"], geneval_url=server.url, geneval_score=kind)["geneval"]
        prompts = ["a photo of two clocks", "a photo of a red cup"]
        assert judge(pictures(2, 16), prompts, [json.dumps(entry) for entry in GENEVAL]) == expected


def test_geneval_without_metadata_is_an_error_and_not_0():
    judge = judges(["geneval"], geneval_url="http://127.0.0.1:18085/")["geneval"]
    with pytest.raises(ValueError, match=r"geneval: prompt 1 \('b'\) has metadata None.*column `metadata`"):
        judge(pictures(2, 16), ["a", "b"], [GENEVAL[0], None])


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (pickle.dumps({"outputs": [0.5]}), "deqa: 1 scores for 2 images"),
        (pickle.dumps({"outputs": [0.5, float("nan")]}), "the score of image 1 is nan"),
        (pickle.dumps({"outputs": [0.5, 3.0]}), "score 1 is 3.0, expected 0 to 1"),
        (pickle.dumps({"outputs": [0.5, "0.5"]}), "the score of image 1 is '0.5'"),
        (pickle.dumps({"scores": []}), r"expected a dict with the list 'outputs', found \['scores'\]"),
        (pickle.dumps([1]), "found list"),
        (pickle.dumps({"outputs": np.zeros(2)}), "only plain data is read"),
        (b"<html>", "refused a pickle"),
    ],
)
def test_nonsense_from_a_pickle_server_is_an_error(reply, message):
    with serve(lambda request: (200, reply)) as server:
        judge = judges(["deqa"], deqa_url=server.url)["deqa"]
        with pytest.raises(ServerError, match=message) as caught:
            judge(pictures(2, 16), ["", ""])
    assert 'gunicorn "app_deqa:create_app()"' in str(caught.value)
    assert server.url in str(caught.value)


# transport


def test_a_busy_server_is_asked_again_a_few_times():
    statuses = [503, 429, 200]
    with serve(lambda request: (statuses.pop(0), b"ok")) as server:
        assert Server(server.url, "start", retries=2).post("x", b"body", "text/plain") == b"ok"
        assert [request.body for request in server.requests] == [b"body"] * 3
    with serve(lambda request: (500, b"Traceback: CUDA out of memory")) as server:
        with pytest.raises(ServerError, match=r"status 500: Traceback: CUDA out of memory, 3 attempts"):
            Server(server.url, "start", retries=2).post("", b"", "text/plain")
        assert len(server.requests) == 3


def test_a_refusal_is_not_repeated():
    with serve(lambda request: (400, b"bad picture")) as server:
        with pytest.raises(ServerError, match="status 400: bad picture"):
            Server(server.url, "start", retries=5).post("", b"", "text/plain")
        assert len(server.requests) == 1


def test_a_server_that_is_down_names_address_and_command():
    url = closed_port()
    with pytest.raises(ServerError, match=f"{url}: .*ConnectError.*2 attempts(?s:.*)run me"):
        Server(url, "run me", retries=1).post("", b"", "text/plain")
    judge = judges(["deqa"], deqa_url=url)["deqa"]
    with pytest.raises(ServerError, match=r"no answer.*ConnectError"):
        judge.check()


def test_a_slow_server_is_given_up():
    release = threading.Event()
    with serve(lambda request: (release.wait(20), (200, b"late"))[1]) as server:
        with pytest.raises(ServerError, match=r"ReadTimeout.*1 attempts of 0.2 s"):
            Server(server.url, "start", timeout_s=0.2, retries=0).post("", b"", "text/plain")
        release.set()


def test_an_answer_that_drips_is_given_up():
    listener = socket.create_server(("127.0.0.1", 0))
    stop = threading.Event()

    def drip():
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            while not stop.wait(0.02):
                try:
                    connection.sendall(b"x")  # every piece in time, the whole never
                except OSError:
                    return

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(ServerError, match=r"no complete answer within 0\.3 s, 1 attempts"):
        Server(url, "start", timeout_s=0.3, retries=0).post("", b"", "text/plain")
    stop.set()
    thread.join(10)
    listener.close()


def test_an_endless_answer_is_refused(monkeypatch):
    monkeypatch.setattr("reward_utils.transport.MAX_REPLY_BYTES", 1000)
    with (
        serve(lambda request: (200, b"x" * 100_000)) as server,
        pytest.raises(ServerError, match="more than 1000 bytes"),
    ):
        Server(server.url, "start").post("", b"", "text/plain")


def test_addresses_must_be_http():
    for url in ("localhost:80", "http://", "http://127.0.0.1:port/", "ftp://127.0.0.1/"):
        with pytest.raises(ValueError, match=f"'{url}': expected http://HOST:PORT"):
            Server(url, "start")


# UnifiedReward


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Fine.\nFinal Score: 4.5", 4.5),
        ("Final Score: 3.", 3),
        ("Final Score:\n1", 1),
        ("Final Score: 10", None),  # not 1
        ("Final Score: 5.7", None),
        ("Final Score: 0", None),
        ("Final Score: 2.3.4", None),
        ("Final Score: high", None),
        ("Score: 4", None),
    ],
)
def test_reading_the_final_score(reply, score):
    assert read_final_score(reply) == score


def test_unified_reward_sends_512_pixels_and_masks_what_it_cannot_read():
    def answer(request):
        sent = json.loads(request.body)
        picture, text = sent["messages"][0]["content"]
        assert picture["image_url"]["url"].startswith("data:image/png;base64,iVBORw0KGgo")
        assert request.headers["Authorization"] == "Bearer unireward"
        known = "Text Caption: [a {red} cup]" in text["text"]
        content = "Final Score: 4" if known else "I cannot judge this."
        return 200, json.dumps({"choices": [{"message": {"content": content}}]}).encode()

    with serve(answer) as server:
        judge = judges(["unified_reward"], unified_reward_url=server.url + "/v1")["unified_reward"]
        assert judge(pictures(2, 16), ["a {red} cup", "b"]) == [4, None]
        assert judge.last_failure == "I cannot judge this."
        assert len(server.requests) == 3  # two, and one more attempt


# our own server


class Answerless(Brightness):
    """A judge that cannot say anything about dark pictures."""

    name = "answerless"
    can_fail = True

    def score(self, images, prompts, metadata):
        self.last_failure = "too dark"
        return [value if value > 0.4 else None for value in super().score(images, prompts, metadata)]


@pytest.fixture
def reward_server(monkeypatch):
    """Starts a server of these judges; gives it back with its address."""
    started = []

    def start(scorers, **options):
        server = RewardServer(scorers, **options)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        started.append(server)
        return server, f"http://127.0.0.1:{server.server_port}"

    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    yield start
    for server in started:
        server.shutdown()
        server.server_close()


def test_a_remote_judge_checks_its_prompts_as_a_local_one():
    remote = judges(["geneval", "brightness"], remote_rewards=["geneval=http://x", "brightness=http://x"])
    remote["brightness"].check_rows(["a dog"], [None])
    with pytest.raises(ValueError, match=r"geneval: prompt 0 \('a dog'\) has metadata None"):
        remote["geneval"].check_rows(["a dog"], [None])


def test_a_judge_in_our_server_scores_as_it_does_here(reward_server):
    local = Brightness()
    _, url = reward_server({"brightness": Brightness(), "answerless": Answerless()})
    remote = judges(["brightness", "answerless"], remote_rewards=[f"brightness={url}", f"answerless={url}"])
    images = pictures(3, 16)
    images[1] *= 0.5
    for judge in remote.values():
        judge.check()
    assert remote["brightness"].server is remote["answerless"].server
    # PNG holds 8 bits
    expected = local(to_bytes(images).float() / 255, [""] * 3)
    assert remote["brightness"](images, ["", "", ""]) == pytest.approx(expected, abs=1e-6)
    seen = remote["answerless"](images, [""] * 3)
    assert [score is None for score in seen] == [score <= 0.4 for score in expected] == [False, True, False]
    assert remote["answerless"].last_failure == "too dark"


def test_two_judges_of_one_server_are_one_request(reward_server):
    judge = Brightness()
    server, url = reward_server({"brightness": judge, "answerless": Answerless()})
    calls = []
    score = server.score
    server.score = lambda request: calls.append(request["rewards"]) or score(request)
    remote = judges(["brightness", "answerless"], remote_rewards=[f"brightness={url}", f"answerless={url}"])
    images = pictures(2, 16)
    for client in remote.values():
        client(images, ["a", "b"])
    assert calls == [["brightness", "answerless"]]


def test_an_open_address_needs_a_token(monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    for host in ("0.0.0.0", "::", "example.org", ""):
        with pytest.raises(ValueError, match=r"set \$REWARD_SERVER_TOKEN"):
            RewardServer({}, host=host)


def test_a_token_is_asked_for_and_sent(reward_server, monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, "secret")
    _, url = reward_server({"brightness": Brightness()})
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        assert httpx2.get(url + "/health", headers=headers, trust_env=False).status_code == 401
        assert httpx2.post(url + "/score", headers=headers, content=b"", trust_env=False).status_code == 401
    client = judges(["brightness"], remote_rewards=[f"brightness={url}"])["brightness"]
    client.check()
    assert len(client(pictures(1, 16), [""])) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": ["clip"]}, "no clip here, only brightness"),
        ({"images": []}, "images must be a list of bytes, not empty"),
        ({"images": [b"GIF89a"]}, "image 0 is not a readable PNG"),
        ({"prompts": ["a", "b"]}, "1 images and 2 prompts"),
        ({"prompts": [1]}, "prompts must be a list of str"),
        ({"metadata": [{}, {}]}, "2 metadata entries for 1 images"),
        ({"metadata": 5}, "metadata is a int, expected a list"),
        ({"metadata": [{"a": msgpack.ExtType(3, b"x")}]}, "metadata is not what JSON can hold"),
    ],
)
def test_bad_requests_are_explained(reward_server, change, message):
    _, url = reward_server({"brightness": Brightness()})
    request = {"rewards": ["brightness"], "images": png_bytes(pictures(1, 8)), "prompts": ["a"], **change}
    reply = httpx2.post(url + "/score", content=msgpack.packb(request), trust_env=False)
    assert reply.status_code == 400
    assert message in reply.json()["error"]


def test_requests_may_be_json_with_base64_images(reward_server):
    _, url = reward_server({"brightness": Brightness()})
    images = pictures(2, 8)
    files = [base64.b64encode(file).decode() for file in png_bytes(images)]
    request = {"rewards": ["brightness"], "images": files, "prompts": ["a", "b"]}
    reply = httpx2.post(url + "/score", json=request, trust_env=False)
    expected = Brightness()(to_bytes(images).float() / 255, ["a", "b"])
    assert reply.json()["scores"]["brightness"] == pytest.approx(expected, abs=1e-6)
    for broken in ({**request, "images": ["no base64"] * 2}, {**request, "images": [1, 2]}):
        reply = httpx2.post(url + "/score", json=broken, trust_env=False)
        assert (reply.status_code, "not JSON with base64" in reply.json()["error"]) == (400, True)


def test_a_body_that_is_no_request_is_refused(reward_server, monkeypatch):
    _, url = reward_server({"brightness": Brightness()})
    for body in (b"", b"\xc1", pickle.dumps({"rewards": ["brightness"]}), msgpack.packb([1])):
        assert httpx2.post(url + "/score", content=body, trust_env=False).status_code == 400
    monkeypatch.setattr("reward_utils.server.MAX_REQUEST_BYTES", 10)
    assert httpx2.post(url + "/score", content=b"x" * 11, trust_env=False).status_code == 413
    assert httpx2.get(url + "/elsewhere", trust_env=False).status_code == 404


def test_a_client_explains_what_the_server_does_not_have(reward_server):
    _, url = reward_server({"brightness": Brightness()})
    client = judges(["maniqa"], remote_rewards=[f"maniqa={url}"])["maniqa"]
    with pytest.raises(ServerError, match=r"it has brightness, but not maniqa(?s:.*)--rewards maniqa --port PORT"):
        client.check()
    with serve(lambda request: (200, b"[]")) as other, pytest.raises(ServerError, match="it is not a reward server"):
        judges(["maniqa"], remote_rewards=[f"maniqa={other.url}"])["maniqa"].check()


def test_a_judge_that_fails_over_there_says_so_here(reward_server, monkeypatch):
    monkeypatch.setattr(Brightness, "score", lambda self, *inputs: [float("nan")])
    _, url = reward_server({"brightness": Brightness()})
    client = judges(["brightness"], remote_rewards=[f"brightness={url}"])["brightness"]
    with pytest.raises(ServerError, match=r"status 400: .*the score of image 0 is nan"):
        client(pictures(1, 16), [""])


def test_a_remote_judge_needs_a_prompt_only_if_the_judge_does():
    remote = judges(
        ["maniqa", "clip", "unknown"], remote_rewards=[f"{name}=http://x" for name in ("maniqa", "clip", "unknown")]
    )
    assert [judge.reads_text for judge in remote.values()] == [False, True, True]


@pytest.mark.parametrize("entry", ["maniqa", "=http://x", "maniqa=localhost:1"])
def test_remote_entries_are_name_and_address(entry):
    with pytest.raises(ValueError, match="expected NAME=http://HOST:PORT"):
        parse_remote([entry])


def test_pictures_that_unpack_to_giants_are_refused(reward_server, monkeypatch):
    _, url = reward_server({"brightness": Brightness()})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    request = {"rewards": ["brightness"], "images": png_bytes(pictures(1, 16)), "prompts": ["a"]}
    reply = httpx2.post(url + "/score", content=msgpack.packb(request), trust_env=False)
    assert reply.status_code == 400
    assert "not a readable PNG" in reply.json()["error"]
