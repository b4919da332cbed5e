"""The comparison of Duet with its peers. `procs` runs and measures processes, `certs` makes the peers' certificates,
`peers` and `duet` start what is measured, `load` drives it, `rows` says what is compared, `report` writes it down."""
