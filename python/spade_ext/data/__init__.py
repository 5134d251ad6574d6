from . import image as image
from . import listops as listops
