"""What tests share; CONTRIBUTING.md says which module has what."""
