"""Speed of nearfield next to its peers and to the limit of the machine: `make bench`."""
