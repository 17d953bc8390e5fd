# SPDX-License-Identifier: Apache-2.0
"""Signals are taken while the main thread is in code that does not look for them."""

import subprocess
import sys
import textwrap

STOPPED = 75


def run(code: str) -> subprocess.CompletedProcess:
  """Runs a program that has a `stop`, which ends the process with the stopped code."""
  program = """
    import ctypes, functools, os, signal, threading, time
    from mm1_jax.train.stop import SIGNALS, Stop, leave
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # it may be ignored, as under nohup
    stop = Stop(functools.partial(leave, code=75))
    def native_sleep(seconds):  # in a mutex, from which no signal wakes
      libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(128)
      libc.pthread_mutex_lock(mutex)
      wake = threading.Timer(seconds, libc.pthread_mutex_unlock, [mutex])
      wake.daemon = True
      wake.start()
      libc.pthread_mutex_lock(mutex)
    def later(number, seconds):
      threading.Timer(seconds, os.kill, (os.getpid(), number)).start()
  """
  return subprocess.run(
    [sys.executable, "-c", textwrap.dedent(program) + textwrap.dedent(code)],
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )


def test_while_starting_a_signal_ends_the_process_even_in_native_code():
  result = run("""
    with stop:
      later(signal.SIGTERM, 0.2)
      native_sleep(30)
    print("slept")
  """)
  assert result.returncode == STOPPED
  assert result.stderr == "stopped by SIGTERM while starting: nothing is lost, run again\n"
  assert result.stdout == ""


def test_after_that_it_is_a_request_that_native_code_does_not_hide():
  result = run("""
    with stop:
      stop.begin_steps()
      later(signal.SIGHUP, 0.2)
      seen = []
      threading.Timer(1.0, lambda: seen.append(stop.requested)).start()
      native_sleep(3)
    print(*seen, stop.agreed)
  """)
  assert result.returncode == 0, result.stderr
  assert result.stdout == "SIGHUP True\n"


def test_a_second_signal_is_not_caught():
  result = run("""
    with stop:
      stop.begin_steps()
      os.kill(os.getpid(), signal.SIGTERM)
      os.kill(os.getpid(), signal.SIGTERM)
    print("ended")
  """)
  assert result.returncode == -15
  assert result.stdout == ""


def test_nor_one_that_the_main_thread_does_not_come_to_handle():
  result = run("""
    with stop:
      stop.begin_steps()
      later(signal.SIGTERM, 0.2)
      later(signal.SIGINT, 1.7)
      native_sleep(30)
    print("slept")
  """)
  assert result.returncode == STOPPED
  assert result.stderr == "stopped by a second SIGINT: not saved\n"


def test_handlers_are_as_before_and_nohup_stays():
  result = run("""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    before = [signal.getsignal(s) for s in SIGNALS]
    with stop:
      assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
      assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(s) for s in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1
    assert threading.active_count() == 1
  """)
  assert result.returncode == 0, result.stderr
