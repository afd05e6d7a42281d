"""Programs that try to get out of nanochat.execution, to exhaust the machine, or to pass without being right.

A program may use what HEAD defines: gain(action, ...) tries actions and prints a marker for one that works; CANARY,
OUTSIDE, SOCKET, ABSTRACT, PORT and PARENT are a secret file, a folder that everybody may write, the addresses of
listeners, and the process id of the tests; CHILD is the module of the other side of the pipe REPLIES.
"""

MARKER = "ESCA" + "PED"
HEAD = """
import ctypes, os, signal, socket, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def gain(*actions):
    for action in actions:
        try:
            result = action()
        except BaseException as error:
            print(type(error).__name__, str(error)[:80])
        else:
            print('ESCA' + 'PED', repr(result)[:200])
frame = sys._getframe()
while frame and 'replies' not in frame.f_locals:
    frame = frame.f_back
REPLIES = frame.f_locals['replies'].fileno() if frame else 1
CHILD = sys.modules['__main__']
"""

PROGRAMS = {
    # files
    "read: canary": "print(open(CANARY).read())",
    "read: canary by C": """
libc.fopen.restype = ctypes.c_void_p
gain(lambda: 1 / bool(libc.fopen(CANARY.encode(), b'r')))
""",
    "read: canary from a root descriptor": """
d = os.open('/', os.O_PATH)
print(open(os.open('..' + CANARY, 0, dir_fd=d)).read())
""",
    "read: canary by the parent's root": "print(open(f'/proc/{PARENT}/root' + CANARY).read())",
    "read: homes and devices": """
for p in ('/etc/passwd', '/root/.bashrc', '/dev/kmsg', '/dev/vda', '/dev/tty'):
    gain(lambda: open(p, 'rb').read(1))
gain(*(lambda p=p: os.listdir(p)[0] for p in ('/home', '/tmp', '/var', '/etc', '/proc', '/sys', '/dev')))
""",
    "read: own environment": """
print(os.environ)
p = ctypes.POINTER(ctypes.c_char_p).in_dll(libc, 'environ')
i = 0
while p and p[i]:
    print(p[i])
    i += 1
""",
    "read: environments in /proc": """
for i in ('self', 'thread-self', 1, PARENT, os.getpid()):
    gain(lambda: open(f'/proc/{i}/environ', 'rb').read())
gain(lambda: open(f'/proc/{PARENT}/mem', 'rb'), lambda: open('/proc/self/mem', 'r+b'))
""",
    "read: inherited descriptors": """
for fd in range(256):
    try:
        if fd not in (frame.f_locals['requests'].fileno(), REPLIES): print(fd, os.read(fd, 999))
    except OSError: pass
""",
    "write: outside": "open(OUTSIDE + '/x', 'w').write('x')",
    "write: canary": """
gain(lambda: open(CANARY, 'a'), lambda: os.remove(CANARY), lambda: os.rename(CANARY, OUTSIDE + '/x'))
gain(lambda: os.truncate(CANARY, 0), lambda: os.chmod(CANARY, 0o777), lambda: os.chown(CANARY, 1, 1))
gain(lambda: os.utime(CANARY, (0, 0)), lambda: os.link(CANARY, 'link'), lambda: os.symlink(CANARY, 'link'))
""",
    "write: standard library": """
gain(lambda: open(os.__file__, 'a'), lambda: open(os.path.dirname(os.__file__) + '/x.py', 'w'))
gain(*(lambda p=p: open(p + '/escape', 'w') for p in ('/dev/shm', '/tmp', '/var/tmp', '/run', '/', '.')))
""",
    "write: bytes to every descriptor": """
for fd in range(256):
    try: os.write(fd, b'\\n{"value": null}\\n' * 99)
    except OSError: pass
""",
    # sockets
    "network: tcp": "gain(lambda: socket.create_connection(('127.0.0.1', PORT), 1))",
    "network: udp": """
gain(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT)))
""",
    "network: unix": """
gain(lambda: socket.socket(socket.AF_UNIX).connect(SOCKET))
gain(lambda: socket.socket(socket.AF_UNIX).connect('\\0' + ABSTRACT))
""",
    "network: other kinds": """
gain(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0), lambda: socket.socket(40, socket.SOCK_STREAM))
gain(socket.socketpair, lambda: socket.getaddrinfo('localhost', 80))
""",
    # processes and signals
    "process: fork": "gain(os.fork, lambda: 1 / (libc.vfork() >= 0))",
    "process: shell": """
gain(lambda: subprocess.check_output('id', shell=True), lambda: 1 / (os.system(f'touch {OUTSIDE}/x') == 0))
gain(lambda: os.posix_spawn('/bin/sh', ['sh', '-c', 'sleep 60'], {}))
""",
    "process: exec": """os.execv(sys.executable, [sys.executable, '-c', 'print("ESCA" + "PED")'])""",
    "process: threads": """
for _ in range(5):
    gain(threading.Thread(target=time.sleep, args=(60,)).start)
""",
    "process: at exit": """
import atexit
atexit.register(time.sleep, 60)
sys.exit(0)
""",
    "process: outlive the parent": """
libc.prctl(1, 0, 0, 0, 0)
gain(os.setsid)
time.sleep(60)
""",
    "signal: parent": """
gain(lambda: os.kill(PARENT, signal.SIGUSR1), lambda: os.kill(-1, 0), lambda: os.killpg(PARENT, signal.SIGUSR1))
gain(lambda: os.pidfd_open(PARENT), lambda: 1 / (libc.syscall(234, PARENT, PARENT, 10) >= 0))
""",
    "signal: by a pipe's owner": """
import fcntl
gain(*(lambda a=a: fcntl.fcntl(0, *a) for a in ((fcntl.F_SETOWN, PARENT), (10, 10), (fcntl.F_SETFL, os.O_ASYNC))))
""",
    "signal: limits of others": """
import resource
gain(lambda: resource.prlimit(PARENT, resource.RLIMIT_NOFILE), lambda: resource.setrlimit(resource.RLIMIT_AS, (-1, -1)))
gain(lambda: os.setpriority(0, PARENT, 10), lambda: os.sched_setaffinity(PARENT, {0}))
""",
    "signal: ignore them all": """
for s in signal.valid_signals():
    try: signal.signal(s, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass
""",
    "call: what only the kernel forbids": """
numbers = (101, 310, 165, 166, 155, 161, 272, 308, 435, 0x40000000 | 57, 105, 126, 321, 425, 298, 250, 323, 246, 169)
for number in numbers + (313, 168, 170, 227, 29, 240, 135, 303, 437, 428, 172, 151, 163, 253):
    if libc.syscall(number, 0, 0, 0, 0, 0) != -1 or ctypes.get_errno() not in (1, 38): print('ESCA' + 'PED', number)
""",
    "call: fork of 32 bits in machine code": """
import mmap
m = mmap.mmap(-1, 4096, prot=7)
m.write(bytes.fromhex('b802000000cd80c3'))
run = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))
gain(lambda: 1 / (run() >= 0))
""",
    # exhaustion
    "exhaust: loop in f": "def f(x):\n    while True: pass",
    "exhaust: memory": "bytearray(1 << 40)",
    "exhaust: swallowed memory errors": """
x = []
while True:
    try: x.append(bytes(1 << 16))
    except MemoryError: pass
""",
    "exhaust: recursion in C": """
x = []
for _ in range(10**6): x = [x]
sys.setrecursionlimit(10**9)
repr(x)
""",
    "exhaust: gigabyte of output": "for _ in range(10**4): print('x' * 10**5)",
    "exhaust: output past errors": """
while True:
    try: os.write(1, b'x' * 65536)
    except OSError: pass
""",
    "exhaust: crash": "ctypes.string_at(0)",
    "exhaust: endless result": "import itertools\ndef f(x): return itertools.count()",
    "exhaust: ratio that blows up the judge": """
CHILD.pack = lambda v: ['Fraction', '1e999999999']
def f(x): return 1
""",
    "exhaust: nesting that blows up the judge": """
data = memoryview(b'{"value": ' + b'["list", ' * 10**6 + b'\\n')
while data: data = data[os.write(REPLIES, data):]
""",
    "exhaust: half an answer": """
os.write(REPLIES, b'{"value"')
time.sleep(60)
""",
    # verdicts
    "forge: exit at once": "os._exit(0)",
    "forge: exit in f": "def f(x): os._exit(0)",
    "forge: status of a judge that is content": """
print('passed', flush=True)
os._exit(CHILD.PASSED)
""",
    "forge: equal to everything": """
class E:
    __eq__ = lambda a, b: True
    __hash__ = None
def f(x): return E()
""",
    "forge: equal integers": """
class E(int):
    __eq__ = lambda a, b: True
    __ne__ = lambda a, b: False
def f(x): return E(1)
""",
    "forge: patched builtins": """
import builtins
class A(Exception):
    def __new__(cls, *a): os._exit(0)
builtins.AssertionError = A
for n in ('compile', 'exec', 'open', 'isinstance', 'abs', 'len'):
    setattr(builtins, n, lambda *a, **k: True)
def f(x): return 1
""",
    "forge: patched child": """
CHILD.pack = CHILD.unpack = CHILD.describe = lambda *a: 9
CHILD.judge = CHILD.main = CHILD.give_verdict = lambda *a: 0
def f(x): return 1
""",
    "forge: frames and garbage": """
import gc
fr = sys._getframe()
while fr:
    if 'task' in fr.f_locals: print('ESCA' + 'PED', fr.f_locals['task'])
    fr = fr.f_back
for o in gc.get_objects():
    if isinstance(o, dict) and 'prelude' in o: print('ESCA' + 'PED', o)
""",
    "forge: another check": """
def check(candidate): pass
candidate = f = lambda x: 1
""",
    "forge: answers ahead": """
def f(x):
    os.write(REPLIES, b'{"value": 16}\\n' * 9)
    return 16
""",
    "forge: exception hook": """
sys.excepthook = sys.unraisablehook = lambda *a: os._exit(0)
raise ValueError
""",
}
