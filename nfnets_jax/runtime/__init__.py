"""What a run needs of devices, processes and disks; it knows no net."""
