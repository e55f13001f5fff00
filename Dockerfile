# The image of jupyter_exec.DockerJupyterServer. Target "kernel": Python with ipykernel, enough for the direct way.
ARG BASE_IMAGE=python:3.13-slim
FROM ${BASE_IMAGE} AS kernel
# Requirements of pip, one a line.
ARG PACKAGES=""
ENV VIRTUAL_ENV=/opt/venv \
    PATH=/opt/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    HOME=/home/jupyter \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
# Any user may install into the environment and write at home: with bind_dir the user is the directory's owner.
RUN python3 -m venv /opt/venv \
 && printf '%s\n' "${PACKAGES}" | pip install ipykernel -r /dev/stdin \
 && mkdir -p /home/jupyter /workspace \
 && (getent passwd 1000 || useradd --uid 1000 --home-dir /home/jupyter jupyter) \
 && chown 1000 /workspace \
 && chmod -R a+rwX /opt/venv /home/jupyter /workspace
USER 1000:1000
WORKDIR /workspace

# Target "gateway": a Jupyter Kernel Gateway on port 8888 that wants the token in TOKEN.
FROM kernel AS gateway
RUN pip install jupyter_kernel_gateway
ENV TOKEN=UNSET
EXPOSE 8888
CMD ["sh", "-c", "KG_AUTH_TOKEN=$TOKEN exec jupyter-kernelgateway --KernelGatewayApp.ip=0.0.0.0 \
 --KernelGatewayApp.port=8888 --JupyterApp.answer_yes=true --JupyterWebsocketPersonality.list_kernels=true \
 --ZMQChannelsWebsocketConnection.limit_rate=False"]
