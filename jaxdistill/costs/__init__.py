"""What programs cost: FLOPs of functions (`flops`), counts of compiled programs (`hlo`), plans for
slices that are not here (`plan`), and the chips' peaks (`chips`).
"""
