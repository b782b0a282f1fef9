"""Kubernetes: a RayJob for KubeRay."""
