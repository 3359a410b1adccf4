import re

import pytest
from test_personal import NODE

from p2pfm.config import parse_node_config
from p2pfm.errors import ConfigError


@pytest.mark.parametrize("url", ["http://127.0.0.1:8080", "https://gpu.example.org/llm", "http://[::1]:9"])
def test_a_back_end_is_where_the_operator_says(url: str) -> None:
    serving = parse_node_config(f'{NODE}[serving]\nbackend = "llama.cpp"\nbackend_url = "{url}"').serving
    assert (serving.backend, serving.backend_url, serving.backend_s) == ("llama.cpp", url, 60.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('backend = "ollama"', "backend"),
        ('backend = "vllm"\nbackend_url = "127.0.0.1:8000"', "http://HOST:PORT of a vllm server, got '127.0.0.1:8000'"),
        ('backend = "vllm"\nbackend_url = "file:///etc/passwd"', "http://HOST:PORT"),
        ('backend = "vllm"\nbackend_url = "http://:80"', "http://HOST:PORT"),
        ('backend = "vllm"\nbackend_url = "http://h:99999"', "http://HOST:PORT"),
        ('backend = "vllm"\nbackend_url = "http://me:secret@h:80"', "http://HOST:PORT"),
        ('backend = "vllm"\nbackend_url = "http://h:80/?key=1"', "http://HOST:PORT"),
        ("backend_s = 0", "backend_s: expected 0.1 to 3600, got 0"),
        ('backend = "llama.cpp"\n[personal]\nenabled = true', "a private adapter is served by our own engine only"),
    ],
)
def test_a_back_end_that_cannot_be_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_node_config(f"{NODE}[serving]\n{text}")
