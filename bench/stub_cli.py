"""A stand-in for the CLI that costs next to nothing: just enough stream-json for the server to be measured alone.

A user line `events N gap MS` is answered with N text deltas, MS apart (0: all at once); other lines with five. Standard
library only; started by `bench.alone` with `CLAUDE_WRAPPER_CLI`.
"""

import json
import sys
import time

WORD = "word "
_TAIL = ',"session_id":"00000000-0000-4000-8000-000000000000","parent_tool_use_id":null,"uuid":"00000000-0000-4000-8000-000000000001"}\n'
_USAGE = '{"input_tokens":9,"cache_creation_input_tokens":0,"cache_read_input_tokens":0,"output_tokens":%d}'


def event(body: str) -> str:
    return '{"type":"stream_event","event":' + body + _TAIL


DELTA = event('{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"' + WORD + '"}}')
START = event(
    '{"type":"message_start","message":{"id":"msg_1","type":"message","role":"assistant","model":"claude-sonnet-5-5",'
    '"content":[],"stop_reason":null,"stop_sequence":null,"usage":' + _USAGE % 1 + "}}"
) + event('{"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}')


def answer(uuid: str, text: str) -> None:
    words = text.split()
    count, gap = (int(words[1]), float(words[3]) / 1000) if words[:1] == ["events"] else (5, 0.0)
    out = sys.stdout
    out.write(
        f'{{"type":"command_lifecycle","command_uuid":"{uuid}","state":"started"{_TAIL}'
        '{"type":"system","subtype":"init","cwd":"/work","tools":[],"model":"claude-sonnet-5-5"' + _TAIL + START
    )
    due = time.monotonic()
    for _ in range(count):
        if gap:
            out.flush()
            due += gap
            time.sleep(max(0.0, due - time.monotonic()))
        out.write(DELTA)
    said = json.dumps(WORD * count)
    usage = _USAGE % count
    out.write(
        '{"type":"assistant","message":{"id":"msg_1","type":"message","role":"assistant","model":"claude-sonnet-5-5",'
        f'"content":[{{"type":"text","text":{said}}}],"stop_reason":null,"usage":{usage}}}{_TAIL}'
        + event('{"type":"content_block_stop","index":0}')
        + event(
            '{"type":"message_delta","delta":{"stop_reason":"end_turn","stop_sequence":null},"usage":' + usage + "}"
        )
        + event('{"type":"message_stop"}')
        + f'{{"type":"result","subtype":"success","is_error":false,"num_turns":1,"result":{said},"stop_reason":"end_turn",'
        f'"terminal_reason":"completed","total_cost_usd":0,"usage":{usage},"user_message_uuids":["{uuid}"]{_TAIL}'
        f'{{"type":"command_lifecycle","command_uuid":"{uuid}","state":"completed"{_TAIL}'
    )
    out.flush()


def main() -> None:
    for line in sys.stdin:
        frame = json.loads(line)
        if frame["type"] == "user":
            content = frame["message"]["content"]
            answer(frame["uuid"], content if isinstance(content, str) else content[-1].get("text", ""))
        elif frame["type"] == "control_request":
            body = {"subtype": "success", "request_id": frame["request_id"], "response": {"rewound": True}}
            sys.stdout.write(json.dumps({"type": "control_response", "response": body}) + "\n")
            sys.stdout.flush()


main()
