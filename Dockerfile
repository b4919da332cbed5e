# Images of Duet's programs: one static binary each, on nothing.
#
#     docker build --target duet       --tag duet:0.1.0       .    # the whole thing: control plane, CLI
#     docker build --target duet-proxy --tag duet-proxy:0.1.0 .    # the sidecar alone
#     docker build --target shop       --tag shop:0.1.0       .    # the example's services
#
# Works with BuildKit and without it. The binaries are linked statically with glibc (static-pie): names are
# resolved with /etc/resolv.conf and /etc/hosts by code that is in the binary, so no library is needed.

FROM rust:1.95-slim-bookworm AS build
# jemalloc builds with make.
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends make && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY . .
# A --target of its own, even if it is the builder's, keeps crt-static away from proc macros and build scripts.
RUN target=$(rustc -vV | sed -n 's/^host: //p') \
    && CARGO_PROFILE_RELEASE_STRIP=debuginfo RUSTFLAGS='-C target-feature=+crt-static' \
       sh -c 'for packages in "-p duet -p shop" "-p duet-proxy"; do \
                cargo build --release --locked --target "$0" $packages --bins || exit 1; done' "$target" \
    && mkdir -p /out/state \
    && cp "target/$target/release/duet" "target/$target/release/duet-proxy" "target/$target/release/shop" /out/ \
    && for binary in duet duet-proxy shop; do \
         if ldd "/out/$binary" 2>/dev/null | grep '=>'; then echo "$binary is not static" >&2; exit 1; fi; \
       done

# Nobody, with a folder to write to. Kubernetes mounts a volume there; `docker run` can too.
FROM scratch AS nobody
ENV PATH=/usr/local/bin
COPY --from=build --chown=65534:65534 /out/state /var/lib/duet
WORKDIR /var/lib/duet
USER 65534:65534

FROM nobody AS shop
COPY --from=build /out/shop /usr/local/bin/shop
ENTRYPOINT ["/usr/local/bin/shop"]

FROM nobody AS duet-proxy
COPY --from=build /out/duet-proxy /usr/local/bin/duet-proxy
# outbound and the application's API are for the loopback; these two are for the network
EXPOSE 15006 15020
ENTRYPOINT ["/usr/local/bin/duet-proxy"]

FROM nobody AS duet
COPY --from=build /out/duet /usr/local/bin/duet
EXPOSE 15012 15014
ENTRYPOINT ["/usr/local/bin/duet"]
