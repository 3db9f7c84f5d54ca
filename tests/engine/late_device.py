"""A device whose side streams do nothing before somebody waits for them: whoever reads too early reads rubbish.

Its memory is the host's. What the current stream computes is done at once; a copy on another stream is made when the
host waits for it or for a later one, or when the current stream does. That is the latest that CUDA may make it. Memory
that is asked for on a side stream is rubbish too, and what goes back to one is handed out again as soon as possible.
Left out: copies that come too early, memory that is freed while another stream uses it (`test_cuda.py`).
"""

from contextlib import contextmanager
from threading import RLock

import torch
from torch.overrides import TorchFunctionMode

DEVICE = torch.device("cuda")
RUBBISH = 0xA5


LOCK = RLock()
"""Several threads wait for events; a job runs once."""


class Stream:
    """Jobs that wait, in order."""

    def __init__(self, device=None, *, eager=False):
        self.jobs, self.done, self.eager = [], 0, eager

    def add(self, job):
        self.jobs.append(job)
        if self.eager:
            self.run_to(len(self.jobs))

    def run_to(self, count):
        with LOCK:
            while self.done < count:
                self.done += 1
                self.jobs[self.done - 1]()

    def record_event(self):
        return Event(self)

    def wait_event(self, event):
        self.add(event.synchronize)

    def wait_stream(self, other):
        self.wait_event(Event(other))

    def synchronize(self):
        self.run_to(len(self.jobs))


class Event:
    """A place in a stream."""

    def __init__(self, stream):
        self._stream, self._count = stream, len(stream.jobs)

    def synchronize(self):
        self._stream.run_to(self._count)

    def query(self):
        return self._stream.done >= self._count


class LateDevice(TorchFunctionMode):
    """Inside, `torch.cuda` is this device, for the calling thread."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.current = Stream(eager=True)
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self._on)

    @contextmanager
    def _on(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.copy_ and kwargs.pop("non_blocking", False) and not self.current.eager:
            into, from_ = args
            self.current.add(lambda: into.copy_(from_))
            return into
        if func is torch.empty and kwargs.get("device") == DEVICE:
            return torch.empty(*args, **{**kwargs, "device": "cpu"}).fill_(RUBBISH)
        return func(*args, **kwargs)
