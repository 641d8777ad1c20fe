"""Texts and names that a config must refuse, whatever they try."""


def bomb(levels: int, merge: bool = False) -> str:
    """Nine aliases in each level: 9 ** levels leaves out of a few hundred characters."""
    lines = ["a0: &a0 {x: 1}"]
    for level in range(1, levels):
        inside = ", ".join([f"*a{level - 1}"] * 9)
        lines.append(f"a{level}: &a{level} " + (f"{{<<: [{inside}], y{level}: 1}}" if merge else f"[{inside}]"))
    return "\n".join(lines)


HOSTILE = {
    "alias bomb": bomb(9),
    "merge bomb": bomb(9, merge=True),
    "flow lists": "a: " + "[" * 2000,
    "flow mappings": "{a: " * 2000,
    "closed lists": "a: " + "[" * 2000 + "]" * 2000,
    "block mappings": "\n".join(" " * depth + "a:" for depth in range(2000)),
    "block lists": "\n".join(" " * depth + "-" for depth in range(2000)),
    "many values": "a: [" + "1," * 400_000 + "]",
    "many keys": "\n".join(f"k{index}: 1" for index in range(80_000)),
    "circle": "a: &a {b: *a}",
    "comments": "# " + "x" * 900_000 + "\na: [",
    "quotes": "a: '" + "x''" * 300_000,
    "keys of keys": "? " * 2000,
    "tags": "!!python/object/new:os.system [echo hi]",
}

# A module of the user that reaches the standard library by every route, and names that would call it.
EVIL = """
import functools
import os
import os as osalias
import subprocess as sub
from builtins import eval as eval_alias
from os import *
from os import system
from subprocess import Popen as Process

run = os.system
lookup = {"run": os.system}
part = functools.partial(os.system, "touch marker")
join = "".join
made_later = getattr(os, "sys" + "tem")
module_later = __import__("os")
popen, spawn = os.popen, os.spawnlp

class Holder:
    run = os.system
    kept = staticmethod(os.system)
    shell = sub

holder = Holder()
"""

NAMES = [
    "os.system",
    "os:system",
    "os.popen",
    "os.execv",
    "posix.system",
    "nt.system",
    "subprocess.run",
    "subprocess:Popen",
    "subprocess.check_output",
    "builtins.eval",
    "builtins:exec",
    "builtins.__import__",
    "eval",
    "exec",
    "open",
    "compile",
    "__import__",
    "getattr",
    "print",
    "input",
    "vars",
    "breakpoint",
    "importlib.import_module",
    "importlib:import_module",
    "importlib.util.find_spec",
    "pickle.loads",
    "marshal.loads",
    "ctypes.CDLL",
    "pty.spawn",
    "code.interact",
    "runpy.run_path",
    "shutil.rmtree",
    "sys.exit",
    "antigravity",
    "antigravity.geohash",
    "this",
    "types.FunctionType",
    "functools.partial",
    "operator.attrgetter",
    "webbrowser.open",
    "socket.socket",
    "multiprocessing.Process",
    "threading.Thread",
    "tempfile.mktemp",
    "pathlib.Path",
    "collections.OrderedDict",
    "logging.os.system",
    "logging:os.system",
    "json.decoder.JSONDecoder",
    "asyncio.create_subprocess_shell",
    "xmlrpc.client.ServerProxy",
    "turtle.Turtle",
    "zipimport.zipimporter",
    "_thread.start_new_thread",
    "unittest.main",
    "pdb.run",
    "timeit.timeit",
    "cProfile.run",
    "http.server.test",
    "smtplib.SMTP",
    "idlelib.pyshell.main",
    "lib2to3.main.main",
    "torch.os.system",
    "torch:os.system",
    "torch.sys.exit",
    "torch.nn.functional.importlib.import_module",
    "torch.builtins.eval",
    "torch.utils.data.dataloader.os.system",
    "torch.serialization.pickle.loads",
    "torch.hub.shutil.rmtree",
    "torch.ctypes.CDLL",
    "numpy.os.system",
    "numpy.f2py.os.system",
    "numpy.f2py.sys.exit",
    "yaml.sys.exit",
    "yaml.constructor.types.FunctionType",
    "dtrain.config.build.importlib.import_module",
    "dtrain.cli.subprocess.run",
    "dtrain.cli:subprocess.run",
    "dtrain.config.load.os.popen",
    "torchmetrics.utilities.checks.multiprocessing.Process",
    "ml_collections.config_dict.config_dict.inspect.currentframe",
    "evil.system",
    "evil:system",
    "evil.os.system",
    "evil.osalias.system",
    "evil.sub.Popen",
    "evil.Process",
    "evil.eval_alias",
    "evil.run",
    "evil.lookup",
    "evil.part",
    "evil.join",
    "evil.made_later",
    "evil.module_later",
    "evil.module_later.system",
    "evil.popen",
    "evil.spawn",
    "evil.Holder.run",
    "evil.Holder.kept",
    "evil.Holder.shell",
    "evil.Holder.shell.run",
    "evil.holder",
    "evil.holder.run",
    "evil.holder.kept",
    "system",
    "Process",
    "eval_alias",
    "run",
    "part",
    "join",
    "made_later",
    "module_later",
    "popen",
    "spawn",
    "holder",
    "os",
    "sub",
    "osalias",
    "getcwd",
    "torch.__builtins__.eval",
    "torch.__loader__.load_module",
    "torch.nn.__dict__",
    "torch.nn.__spec__.loader.exec_module",
    "torch.nn.Linear.__init__",
    "torch.nn.Linear.__init__.__globals__",
    "torch.nn.Linear.__class__",
    "torch.nn.Linear.__mro__",
    "evil.__builtins__",
    "evil.__builtins__.exec",
    "evil.Holder.__init__.__globals__",
    "evil.Holder.__subclasses__",
    "__main__.x",
    "__builtins__.eval",
    "__future__.x",
    ".os.system",
    "..evil",
    "./evil.py",
    "../evil.run",
    "evil/../os.system",
    "/etc/passwd",
    "os;system",
    "os.system()",
    "os.system('ls')",
    "evil..run",
    "evil.",
    ".evil",
    ":evil",
    "evil:",
    "evil::run",
    "evil:run:x",
    "C:\\x",
    "http://x/y",
    "os\\system",
    "ｏｓ.system",
    "оs.system",
    "os\u200b.system",
]
NAMES += ["", " ", "os system", "evil run", "lambda: 0", "evil\nrun", "os.system\0", "os.system\n", " os.system"]
