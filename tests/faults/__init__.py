"A campaign of faults: processes killed and files damaged at random, the results compared bit for bit with those of an undisturbed run."
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # for `helpers`, as under pytest
