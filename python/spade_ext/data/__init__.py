from . import listops as listops
