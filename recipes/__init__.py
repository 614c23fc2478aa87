"""The recipes that ship with iirsnn: one YAML file each, found by name (`iirsnn train digits`)."""
