"""Attacks on the broker from inside: what a process may send into its socket. They need a real broker and a real CLI.

Beside what the programs notice themselves, the runner compares from outside: every request that the upstream got must
be one that the broker counted, on a permitted path, with the slot's own credential and no other.
"""

from __future__ import annotations

from claude_wrapper.testing.attack.catalogue import Attack

BROKER_PRELUDE = r'''
def wire(data, seconds=5.0):
    """Send bytes into the broker's socket; what comes back until it closes or falls silent."""
    answer = b""
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(seconds)
        try:
            s.connect(T["socket"]); s.sendall(data)
            while len(answer) < 1 << 20:
                piece = s.recv(65536)
                if not piece: break
                answer += piece
                if b"message_stop" in answer or answer.endswith(b"}") or b"HTTP/1.1 4" in answer[:12]: break
        except OSError: pass
    return answer
MESSAGE = json.dumps({"model": "claude-sonnet-5-5", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}).encode()
def request(target="/v1/messages", body=MESSAGE, token=None, method="POST", headers=(), length=True):
    lines = ["%s %s HTTP/1.1" % (method, target), "host: broker.invalid", "x-api-key: " + (token or T["token"]), "anthropic-version: 2023-06-01", "content-type: application/json", *headers]
    if length: lines.append("content-length: %d" % len(body))
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body
def status(data):
    try: return int(wire(data).split(b" ", 2)[1])
    except (IndexError, ValueError): return 0
'''

_ALL = ("bwrap", "restricted", "none")

BROKER_ATTACKS: tuple[Attack, ...] = (
    Attack(
        "broker: work under another slot's token",
        "if status(request()) != 200: sys.exit('its own token is refused: %r' % wire(request()))\n"
        "for token in (T['other_token'], '', 'sk-ant-slot-guess', 'x'):\n"
        "    if status(request(token=token or ' ')) == 200: breach('answered for ' + token[:12])\n"
        "if status(request(headers=['authorization: Bearer ' + T['other_token']], token='x')) == 200: breach('bearer')",
        _ALL,
        needs_cli=True,
    ),
    Attack(
        "broker: reach other paths of the upstream",
        "for method, target in (('GET', '/v1/files'), ('POST', '/v1/messages/batches'), ('POST', '/v1/messages/../files'), ('POST', '//v1/messages'),\n"
        "    ('POST', '/v1/messages%2f..%2ffiles'), ('POST', '/v1/messages;x=/v1/files'), ('GET', '/api/oauth/profile'), ('GET', '/v1/organizations/api_keys'),\n"
        "    ('POST', 'http://169.254.169.254/v1/messages'), ('POST', 'https://api.anthropic.com/v1/files'), ('CONNECT', '127.0.0.1:%d' % T['tcp']),\n"
        "    ('POST', '/v1/messages#/../files'), ('POST', '/v1/messages?x=\\x01'), ('GET', '/v1/models/../files'), ('GET', '/v1/models/..%2ffiles'),\n"
        "    ('GET', '/mcp/docs'), ('PUT', '/v1/messages'), ('POST', '*'), ('OPTIONS', '*')):\n"
        "    if status(request(target, method=method)) == 200: breach(method + ' ' + target)",
        _ALL,
        needs_cli=True,
    ),
    Attack(
        "broker: smuggle headers to the upstream",
        "for headers in (['x-api-key: sk-ant-own'], ['authorization: Bearer own'], ['X-API-KEY: a', 'x-Api-Key: b'], ['proxy-authorization: x'],\n"
        "    ['x-a: b\\r\\n x-api-key: folded'], ['x-a: b\\nx-api-key: bare'], ['x-a: b\\rx-api-key: cr'], ['x-forwarded-for: 10.0.0.1', 'forwarded: for=1', 'via: 1.1 x'],\n"
        "    ['connection: x-api-key, host'], ['cookie: a=b'], ['x-a\\x00: b'], ['x-a : b'], ['expect: 100-continue'], ['upgrade: h2c', 'connection: upgrade']):\n"
        "    status(request(headers=headers))",
        _ALL,
        needs_cli=True,
    ),
    Attack(
        "broker: split requests",
        "hidden = request()\n"
        "chunk = b'%x\\r\\n%b\\r\\n0\\r\\n\\r\\n' % (len(MESSAGE), MESSAGE)\n"
        "for data in (request(headers=['transfer-encoding: chunked'], body=chunk) + hidden,\n"
        "    request(headers=['content-length: 5']) + hidden, request(headers=['content-length: +%d' % len(MESSAGE)], length=False) + hidden,\n"
        "    request(headers=['transfer-encoding: xchunked'], body=MESSAGE + hidden), request(headers=['transfer-encoding: chunked', 'transfer-encoding: identity'], body=chunk, length=False) + hidden,\n"
        "    request(headers=['Transfer-Encoding:\\x0bchunked'], body=chunk, length=False) + hidden,\n"
        "    request(headers=['transfer-encoding: chunked'], body=b'-1\\r\\n' + hidden, length=False), request(headers=['transfer-encoding: chunked'], body=b'ffffffffffffffff1\\r\\n' + hidden, length=False),\n"
        "    request(headers=['transfer-encoding: chunked'], body=chunk[:-2] + b'trailer: x\\r\\nx-api-key: t\\r\\n\\r\\n', length=False) + hidden,\n"
        "    request() + hidden, request().replace(b'\\r\\n', b'\\n') + hidden, request(method='GET', target='/v1/models', body=b'') + hidden):\n"
        "    wire(data, 2)",
        _ALL,
        needs_cli=True,
    ),
    Attack(
        "broker: send 10 GB, declared",
        "began = time.time()\n"
        "s = socket.socket(socket.AF_UNIX); s.settimeout(5); s.connect(T['socket'])\n"
        "s.sendall(request(body=b'', length=False, headers=['content-length: %d' % (10 << 30)]))\n"
        "try: answer = s.recv(4096)\n"
        "except OSError: answer = b''\n"
        "if b' 413 ' not in answer[:20]: breach('answered %r after %.1f s' % (answer[:20], time.time() - began))",
        _ALL,
        needs_cli=True,
    ),
    Attack(
        "broker: send 10 GB, streamed",
        "s = socket.socket(socket.AF_UNIX); s.settimeout(5); s.connect(T['socket'])\n"
        "s.sendall(request(body=b'', length=False, headers=['transfer-encoding: chunked']))\n"
        "piece, sent, until = b'100000\\r\\n' + b'x' * (1 << 20) + b'\\r\\n', 0, time.time() + 20\n"
        "try:\n"
        "    while sent < 10 << 30 and time.time() < until: s.sendall(piece); sent += 1 << 20\n"
        "except OSError: pass\n"
        "print('sent', sent >> 20, 'MiB')\n"
        "if sent > 160 << 20: breach('%d MiB were taken' % (sent >> 20))",
        _ALL,
        needs_cli=True,
    ),
    Attack(
        "broker: open 1,000 connections",
        "held = []\n"
        "for _ in range(1000):\n"
        "    s = socket.socket(socket.AF_UNIX); s.settimeout(1)\n"
        "    try: s.connect(T['socket']); held.append(s)\n"
        "    except OSError: s.close()\n"
        "time.sleep(1)\n"
        "alive = 0\n"
        "for s in held:\n"
        "    s.setblocking(False)\n"
        "    try: s.recv(1)\n"
        "    except BlockingIOError: alive += 1\n"
        "    except OSError: pass\n"
        "print('held', alive)\n"
        "if alive > 200: breach('%d are held open' % alive)",
        _ALL,
        needs_cli=True,
    ),
    Attack(
        "broker: ask for what was not bound",
        "for body in (b'[' * 100000, b'{\"model\":' * 2000, b'{\"model\": 1}', b'\\xff' * 100, b'{}'):\n"
        "    if status(request(body=body)) == 200: breach('answered %r' % body[:30])",
        _ALL,
        needs_cli=True,
    ),
    Attack(
        "broker: ask for another model than the turn's",
        "own = MESSAGE[:-1]\n"
        "if status(request()) != 200: sys.exit('its own model is refused: %r' % wire(request()))\n"
        "for body in (MESSAGE.replace(b'sonnet', b'opus'), MESSAGE.replace(b'sonnet', b'haiku'), MESSAGE.replace(b'claude-sonnet-5-5', b'opus'),\n"
        '    own + b\', "model": "claude-opus-5-5"}\', own + b\', "mod\\\\u0065l": "claude-opus-5-5"}\', own + b\', "fallbacks": [{"model": "claude-opus-5-5"}]}\',\n'
        '    own + b\', "tools": [{"type": "advisor_20260301", "name": "advisor", "model": "claude-opus-5-5"}]}\', own + b\', "speed": "fast"}\'):\n'
        "    for target in ('/v1/messages', '/v1/messages?beta=true', '/v1/messages/count_tokens'):\n"
        "        if status(request(target, body=body)) != 403: breach('%s answered %r' % (target, body[40:160]))",
        _ALL,
        needs_cli=True,
    ),
    Attack(
        "find the credential in the CLI's memory",
        "held, own = 0, False\n"
        "try:\n"
        "    pid = T['cli_pid']\n"
        "    with open('/proc/%d/mem' % pid, 'rb', 0) as mem:\n"
        "        for line in read('/proc/%d/maps' % pid).decode().splitlines():\n"
        "            span, mode = line.split()[:2]\n"
        "            begin, end = (int(part, 16) for part in span.split('-'))\n"
        "            if mode[:2] != 'rw' or held > 1 << 29 or end - begin > 1 << 28: continue\n"
        "            try: mem.seek(begin); text = mem.read(end - begin)\n"
        "            except (OSError, OverflowError, ValueError): continue\n"
        "            held += len(text); own = own or T['token'].encode() in text\n"
        "            if T['credential'].encode() in text: breach('in the memory of the CLI')\n"
        "except OSError as error: print('memory is closed', error)\n"
        "print('searched', held >> 20, 'MiB')\n"
        "if held and not own: sys.exit('the search is blind: it does not find the dummy token either')\n"
        "for target in ('/', '/v1/models', '/v1/messages'):\n"
        "    for method in ('GET', 'POST', 'HEAD', 'TRACE', 'OPTIONS'):\n"
        "        if T['credential'].encode() in wire(request(target, method=method), 2): breach('told by the broker')",
        _ALL,
        needs_cli=True,
    ),
)
