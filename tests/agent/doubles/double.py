"""A process that speaks just enough stream-json, and misbehaves as its first argument says. Standard library only."""

import json
import os
import signal
import subprocess
import sys
import time

MODE = sys.argv[1]


def say(**frame):
    sys.stdout.write(json.dumps(frame) + "\n")
    sys.stdout.flush()


def answer(uuid, frames=2, text="hello"):
    say(type="command_lifecycle", command_uuid=uuid, state="started")
    for index in range(frames):
        say(type="stream_event", event={"type": "delta", "uuid": uuid, "index": index})
    say(type="result", subtype="success", result=text, user_message_uuids=[uuid])
    say(type="command_lifecycle", command_uuid=uuid, state="completed")


def on_user(uuid):
    if MODE == "dies":
        say(type="command_lifecycle", command_uuid=uuid, state="started")
        say(type="stream_event", event={"type": "delta"})
        sys.stderr.write("out of cheese\n")
        sys.stderr.flush()
        os._exit(3)
    if MODE == "flood":
        say(type="command_lifecycle", command_uuid=uuid, state="started")
        line = json.dumps({"type": "stream_event", "event": {"type": "delta", "text": "x" * 1000}}) + "\n"
        while True:
            sys.stdout.write(line * 100)
    if MODE == "hugeline":
        sys.stdout.write('{"type":"stream_event","event":"' + "x" * 3_000_000)
        sys.stdout.flush()
        return
    if MODE == "garbage":
        print("npm warn something\n[1,2]\n{}\n\x00")
    if MODE == "garbageflood":
        for _ in range(1000):
            print("npm warn something")
        sys.stdout.flush()
        return
    if MODE == "unstoppable":  # streams for ever and does not listen to interrupts
        say(type="command_lifecycle", command_uuid=uuid, state="started")
        while True:
            say(type="stream_event", event={"type": "delta"})
            time.sleep(0.005)
    if MODE == "stderrflood":
        for index in range(20_000):
            sys.stderr.write(f"line {index} {'e' * 80}\n")
        sys.stderr.flush()
    if MODE == "closes":
        os.close(1)
        time.sleep(60)
    if MODE == "many":
        answer(uuid, frames=5000)
        return
    if MODE == "asks":
        say(type="command_lifecycle", command_uuid=uuid, state="started")
        say(type="control_request", request_id="q1", request={"subtype": "can_use_tool", "tool_name": "Bash"})
        reply = json.loads(sys.stdin.readline())
        say(type="stream_event", event=reply)
    answer(uuid)


def main():
    if MODE == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if MODE == "grandchild":  # holds stdout and stderr open, in the same group
        subprocess.Popen(["sleep", "300"], stdin=subprocess.DEVNULL)
        say(type="system", subtype="init", session_id="11111111-2222-4333-8444-555555555555")
    if MODE == "deaf":
        time.sleep(300)
    for line in sys.stdin:
        frame = json.loads(line)
        if frame["type"] == "user" and MODE != "hang":
            on_user(frame["uuid"])
        elif frame["type"] == "control_request" and MODE not in {"hang", "mute"}:
            body = {"subtype": "success", "request_id": frame["request_id"], "response": {"mode": MODE}}
            say(type="control_response", response=dict(body, request_id="nobody"))
            say(type="control_response", response=body)
    if MODE in {"stubborn", "lingers"}:
        while True:
            time.sleep(1)


main()
