"""The bits of ``needs``, by which a backward is told what it need not compute."""

NEEDS_X = 1  # dx
NEEDS_STATE = 2  # dh0 and dc0
NEEDS_WEIGHTS = 4  # dw_ih, dw_hh, db, dw_hr, and of the options peephole and layer normalisation
NEEDS_RESET = 8  # dh_reset and dc_reset
NEEDS_MASK = 16  # dh_mask

# Of the operations on points and centres.
NEEDS_POINTS = 1  # dz
NEEDS_CENTERS = 2  # dcenters
