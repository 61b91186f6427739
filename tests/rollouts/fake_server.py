"""A server that answers as ``opd serve`` does, with a model of its own in a thread of the test."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from opd.models import load_model, load_tokenizer
from opd.prompts import Prompt, PromptBatch
from opd.rollouts import Sampler, TransformersEngine
from opd.rollouts.weight_stream import receive
from opd.weights import Weights


class FakeServer(ThreadingHTTPServer):
    """Serves rollouts until it is closed.

    Attributes:
        asked: Completions asked for so far.
        received: How often it has taken weights over.
        ill: What it does instead of answering: None, "hang", "abort" or "refuse".
        delay: Seconds before each completion.
    """

    daemon_threads = True

    def __init__(self, source, port=0, max_tokens=None, ready=True):
        self.model = load_model(str(source)).eval()
        with torch.no_grad():  # as of dummy weights
            for weight in self.model.parameters():
                weight.normal_(std=0.01)
        self.weights = Weights(self.model)
        self.engine = TransformersEngine()
        self.engine.start(self.model, self.weights, load_tokenizer(str(source)))
        self.source, self.max_tokens = str(source), max_tokens or 512
        self.asked, self.received, self.ill, self.delay, self.ready = 0, 0, None, 0.0, ready
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def close(self):
        self.shutdown()
        self.server_close()

    def generate(self, body):
        params = body["sampling_params"]
        asked = params["extra_args"]
        options = {**asked["sampler"], "eos_token_ids": tuple(asked["sampler"]["eos_token_ids"])}
        prompt = Prompt(row=0, token_ids=tuple(body["token_ids"]))
        with self.lock:
            self.asked += 1
            sampled = self.engine(
                PromptBatch.collate([prompt], 0), Sampler(**options), [asked["seed"]]
            )
        ids, logprobs = sampled.completion_ids[0].tolist(), sampled.engine_logprobs[0].tolist()
        reason = "abort" if self.ill == "abort" else "stop" if sampled.finished[0] else "length"
        content = [
            {"token_id": token, "logprob": logprob}
            for token, logprob in zip(ids, logprobs, strict=True)
        ]
        choice = {"finish_reason": reason, "token_ids": ids, "logprobs": {"content": content}}
        return {"choices": [choice]}

    def take_over(self, host, port, key, seconds):
        state = dict(receive(host, int(port), key, float(seconds)))
        with self.lock, self.weights.edit():
            self.model.load_state_dict(state, strict=False)
            self.model.tie_weights()
        self.received += 1


class Handler(BaseHTTPRequestHandler):
    """Its routes."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if not self.server.ready:
            self.answer({"error": "starting"}, 503)
        elif self.path == "/v1/models":
            model = {"id": self.server.source, "max_model_len": self.server.max_tokens}
            self.answer({"data": [model]})
        else:
            self.answer({})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        if self.path == "/collective_rpc" and body["method"] == "opd_describe":
            config = server.model.config
            sizes = {name: getattr(config, name, None) for name in body["args"]}
            self.answer({"results": [{"dtype": "float32", **sizes}]})
        elif self.path == "/collective_rpc":
            if server.ill == "refuse":
                self.answer({"error": {"message": "no room for these weights"}}, 500)
                return
            server.take_over(*body["args"])
            self.answer({"results": [None]})
        elif self.path == "/inference/v1/generate":
            if server.ill == "hang":
                time.sleep(60)
            time.sleep(server.delay)
            self.answer(server.generate(body))
        else:
            self.answer({})

    def answer(self, content, status=200):
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *arguments):
        pass
