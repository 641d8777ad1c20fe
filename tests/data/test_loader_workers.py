"""Loader workers are forked from a rank whose native threads hold locks: they start all the same."""

import ctypes
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from whole_runs import Place, figures

from dtrain.data import loader_workers

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks and /proc of Linux")

# Gloo's threads hold Python's lock on the list of thread states, a semaphore, for 10 ms instead of nanoseconds.
SLOW = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

int sem_post(sem_t *semaphore) {
    int (*post)(sem_t *) = (int (*)(sem_t *))dlsym(RTLD_NEXT, "sem_post");
    char name[16] = "";
    pthread_getname_np(pthread_self(), name, sizeof name);
    if (!strncmp(name, "pt_gloo", 7)) {
        close(open(getenv("SLOWED"), O_CREAT | O_WRONLY, 0600));
        for (double end = now() + 0.01; now() < end;);
    }
    return post(semaphore);
}

static void *spin(void *on) {
    while (*(volatile int *)on);
    return NULL;
}

int begin_to_spin(int *on) {
    pthread_t thread;
    return pthread_create(&thread, NULL, spin, on);
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    source = tmp_path_factory.mktemp("slow") / "slow.c"
    source.write_text(SLOW)
    made = source.with_suffix(".so")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", made, source, "-ldl", "-lpthread"], check=True)
    return made


@pytest.mark.timeout(600)
def test_workers_are_forked_while_gloo_lets_go_of_a_collective(place: Place, library: Path) -> None:
    settings = {
        "model.norm": True, "loaders.batch_size": 2, "loaders.num_workers": 2, "loaders.persistent_workers": False,
        "loaders.test": {"size": 7, "seed": 2}, "trainer.max_epochs": 3,
    }  # fmt: skip
    slowed = place.folder / "slowed"
    env = {"LD_PRELOAD": str(library), "SLOWED": str(slowed)}
    result = place.run(place.config("forked", **settings), ranks=2, cold=True, env=env)
    assert "cannot be preloaded" not in result.text
    assert slowed.exists() or sys.version_info >= (3, 13), "the lock was no semaphore, or the threads have other names"
    assert len(figures(place.path("forked"))["val/loss"]) == 3


switches = []  # a thread may look at its own once more after its test


@pytest.fixture
def spinning(library: Path) -> Iterator[ctypes.c_int]:
    """A native thread that runs until this is 0."""
    switches.append(on := ctypes.c_int(1))
    assert ctypes.CDLL(str(library)).begin_to_spin(ctypes.byref(on)) == 0
    yield on
    on.value = 0


def test_a_fork_waits_until_a_native_thread_is_idle(spinning: ctypes.c_int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_workers, "IDLE_WAIT_SECONDS", 100)
    monkeypatch.setattr(loader_workers, "_no_wait_until", 0.0)
    look, seen = loader_workers._native_thread_runs, []

    def looked() -> bool:
        seen.append(look())
        if len(seen) == 5:
            spinning.value = 0
        return seen[-1]

    monkeypatch.setattr(loader_workers, "_native_thread_runs", looked)
    loader_workers.wait_for_native_threads()
    assert seen[:5] == [True] * 5
    assert seen[-2:] == [False, False]


def test_a_thread_that_is_never_idle_keeps_no_fork_from_being_made(
    spinning: ctypes.c_int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader_workers, "_no_wait_until", 0.0)
    loader_workers.wait_for_native_threads()
    assert loader_workers._native_thread_runs()
    monkeypatch.setattr(loader_workers, "IDLE_WAIT_SECONDS", 1000)
    loader_workers.wait_for_native_threads()  # nor does the next one wait
    assert loader_workers._native_thread_runs()


def test_a_process_that_was_forked_itself_has_no_native_thread_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_workers, "_no_wait_until", 0.0)
    child = os.fork()  # Python's threads do not know their new numbers then
    if not child:
        os._exit(loader_workers._native_thread_runs())
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_what_is_unknown_of_threads_keeps_no_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    assert loader_workers._task_state("/proc/self/task/gone") == b"X"
    assert loader_workers._task_state(f"/proc/self/task/{threading.get_native_id()}") == b"R"
    own, prctl = ctypes.create_string_buffer(16), ctypes.CDLL(None).prctl
    assert prctl(16, own) == 0  # PR_GET_NAME
    assert prctl(15, "a name cut in ü".encode()[:15]) == 0  # PR_SET_NAME
    try:
        assert loader_workers._task_state(f"/proc/self/task/{threading.get_native_id()}") == b"R"
    finally:
        prctl(15, own)
